"""UltraRM: a Llama with a linear head, in openbmb/UltraRM-13b's published layout, with its own template.

Source of the layout and the template: the model card of openbmb/UltraRM-13b.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from c2f_ray.data.prompts import Messages
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.data.trajectory import Float32
from c2f_ray.errors import BadRewardError
from c2f_ray.recipe.schema import UltraRMReward
from c2f_ray.reward.function import Sample

TURNS = {"user": "Human", "assistant": "Assistant"}


class UltraRM(LlamaPreTrainedModel):
    """Keys `model.*` and `regression_head.weight` [1, hidden]; no lm_head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch] of right-padded `input_ids` [batch, tokens]: the head on the last attended token's state."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        return self.regression_head(hidden[torch.arange(len(last)), last]).squeeze(-1)


def load_ultrarm(folder: str, dtype: torch.dtype) -> UltraRM:
    """Loads a checkpoint, in evaluation mode. Raises ValueError naming any missing or unexpected key."""
    loaded: Any = UltraRM.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    model, info = loaded
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"{folder} is not an UltraRM checkpoint: {wrong}")
    return model.eval()


def render_ultrarm(messages: Messages, response: str, separator: str) -> str:
    """`Human: ...{separator}Assistant: ...`, turn after turn. It has no system turn: one joins the first human's."""
    system = "".join(m["content"] + separator for m in messages if m["role"] == "system")
    turns = [f"{TURNS[m['role']]}: {m['content']}" for m in messages if m["role"] != "system"]
    turns[0] = turns[0].replace(": ", f": {system}", 1)
    return separator.join([*turns, f"Assistant: {response}"])


class UltraRMScorer:
    """Scores conversations, batched by token budget. Longest first, so that padding and peak memory are known early."""

    def __init__(self, reward: UltraRMReward) -> None:
        self.reward = reward
        self.device = torch.device("cuda" if reward.gpus_per_worker else "cpu")
        self.tokenizer = load_tokenizer(reward.model)
        model: nn.Module = load_ultrarm(reward.model, getattr(torch, reward.dtype))
        self.model = model.to(self.device)

    def tokens(self, sample: Sample) -> list[int]:
        """Token ids of one conversation; a response that was cut by the limit gets no end-of-sequence token."""
        text = render_ultrarm(sample.messages, sample.response, self.reward.separator)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if self.reward.append_eos and sample.finished:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids[-self.reward.max_tokens :]

    @torch.inference_mode()
    def score(self, samples: list[Sample]) -> Float32:
        """One finite float32 for each sample."""
        tokens = [self.tokens(sample) for sample in samples]
        scores = np.empty(len(tokens), dtype=np.float32)
        order = sorted(range(len(tokens)), key=lambda row: (-len(tokens[row]), row))
        while order:
            longest = len(tokens[order[0]])
            count = max(1, self.reward.tokens_per_batch // longest)
            rows, order = order[:count], order[count:]
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(tokens[row])] = torch.tensor(tokens[row])
                mask[i, : len(tokens[row])] = 1
            scores[rows] = self.model(ids.to(self.device), mask.to(self.device)).float().cpu().numpy()
        if not np.isfinite(scores).all():
            worst = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise BadRewardError(f"reward {scores[worst]} for the response {samples[worst].response[:200]!r}")
        return scores


def check_ultrarm_folder(folder: Path) -> str | None:
    """What is wrong with `folder` as an UltraRM checkpoint, read from its headers alone; None when nothing is."""
    from safetensors import safe_open

    keys: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            keys |= set(tensors.keys())
    if "regression_head.weight" not in keys:
        return "has no regression_head.weight; reward.kind ultrarm needs a model in UltraRM's layout"
    return None
