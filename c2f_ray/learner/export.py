"""The policy as an ordinary Hugging Face folder, written while its layers go by."""

import copy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from c2f_ray.data.atomic import replacing
from c2f_ray.data.model_folder import copy_tokenizer
from c2f_ray.data.shards import MAX_SHARD_BYTES, TORCH_DTYPES, plan_shards, write_shards
from c2f_ray.weights.source import ModuleWeights


def export(model: PreTrainedModel, weights: ModuleWeights, policy: str, chat_template: str, folder: Path) -> None:
    """Writes ``weights`` and what belongs to them; what was at ``folder`` is replaced.

    The tokenizer is that of ``policy``, a folder or a name on the hub; ``chat_template`` is what it was trained with.
    """
    with replacing(folder) as partial:
        partial.mkdir()
        dtypes = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        tensors = {name: (dtypes[dtype], shape) for name, dtype, shape in weights.metadata()}
        write_shards(partial, plan_shards(tensors, MAX_SHARD_BYTES), weights)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = weights.dtype
        config.save_pretrained(partial)
        # Some published sampling settings cannot be saved again; the policy's own file is copied instead.
        GenerationConfig.from_model_config(model.config).save_pretrained(partial)
        copy_tokenizer(policy, partial)
        (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
