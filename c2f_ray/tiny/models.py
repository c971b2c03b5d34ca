"""The models: a Mistral base, an instruct sibling, a reward model laid out as UltraRM-13b, and a pair of Mixtrals."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from c2f_ray.tiny.settings import Settings
from c2f_ray.tiny.tokenizer import policy_tokenizer, reward_tokenizer

MAX_POSITIONS = 256


class RewardModel(nn.Module):
    """UltraRM's shape: a Llama body and `regression_head` on its final-normed hidden states.

    `state_dict` has exactly the keys of openbmb/UltraRM-13b: `model.*` and `regression_head.weight`, no lm_head.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Ids `[batch, time]` to a score at every position `[batch, time]`; UltraRM's is the last attended one's."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.regression_head(hidden).squeeze(-1)

    @torch.no_grad()
    def score(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, batch_size: int = 64) -> list[float]:
        """One score a text, in order; append the tokenizer's eos token to a text whose response ended itself."""
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
            last = batch["attention_mask"].sum(1, keepdim=True) - 1  # padding is on the right
            scores += self(batch["input_ids"], batch["attention_mask"]).gather(1, last)[:, 0].tolist()
        return scores


def policy_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> MistralConfig:
    """One config for base and instruct: they are merged later, and a merge wants every field to agree."""
    return MistralConfig(
        vocab_size=len(tokenizer),
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **_shape(settings),
    )


def new_policy(settings: Settings) -> MistralForCausalLM:
    """A random base; lm_head starts as a copy of the embeddings, which speeds up learning to copy, but is not tied."""
    model = MistralForCausalLM(policy_config(settings, policy_tokenizer(False))).float()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def new_reward(settings: Settings, base: MistralForCausalLM | None) -> RewardModel:
    """A reward model, its body taken from `base` if given: same shape, embedding rows moved to the other tokenizer."""
    words = reward_tokenizer().get_vocab()
    config = LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0, **_shape(settings))
    config.architectures = ["LlamaRewardModel"]
    reward = RewardModel(config).float()
    nn.init.normal_(reward.regression_head.weight, std=config.hidden_size**-0.5 * 0.1)
    if base is None:
        return reward
    state = base.model.state_dict()
    rows = state.pop("embed_tokens.weight")
    reward.model.load_state_dict(state, strict=False)
    _move_rows(rows, reward.model.embed_tokens.weight)
    return reward


@torch.no_grad()
def _move_rows(rows: torch.Tensor, into: torch.Tensor) -> None:
    """Rows by the policy's token ids to those of the same words, or of words with the same part, in the other's."""
    ids = policy_tokenizer(False).get_vocab()
    twins = {"Human:": "Q:", "Assistant:": "A:", "</s>": "<|endoftext|>"}
    for word, row in reward_tokenizer().get_vocab().items():
        if (twin := twins.get(word, word)) in ids:
            into[row] = rows[ids[twin]]


def new_mixtral(settings: Settings, base: MistralForCausalLM) -> MixtralForCausalLM:
    """The base upcycled (arXiv 2212.05055): each expert is its MLP with some noise, so that routing matters."""
    words = reward_tokenizer().get_vocab()
    config = MixtralConfig(
        vocab_size=len(words),
        num_local_experts=settings.pair_experts,
        num_experts_per_tok=2,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **_shape(settings),
    )
    mixtral = MixtralForCausalLM(config).float()
    state = base.state_dict()
    own = mixtral.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                _move_rows(state[name], tensor)
            elif name.endswith("experts.gate_up_proj"):
                mlp = name.removesuffix("experts.gate_up_proj")
                dense = torch.cat([state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"]])
                tensor.copy_(dense + 0.02 * torch.randn_like(tensor))
            elif name.endswith("experts.down_proj"):
                dense = state[name.replace("experts.down_proj", "down_proj.weight")]
                tensor.copy_(dense + 0.02 * torch.randn_like(tensor))
            elif name in state:
                tensor.copy_(state[name])
    return mixtral


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> None:
    """Rounds all weights to bfloat16 values, in which the folders store them, and keeps them as float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def save_policy(model: MistralForCausalLM, folder: Path, with_template: bool) -> None:
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    policy_tokenizer(with_template).save_pretrained(folder)


def load_policy(folder: Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_reward(model: RewardModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.model.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    state = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    reward_tokenizer().save_pretrained(folder)


def save_mixtral(model: MixtralForCausalLM, folder: Path) -> None:
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    reward_tokenizer().save_pretrained(folder)


def load_reward(folder: Path) -> RewardModel:
    model = RewardModel(LlamaConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _shape(settings: Settings) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.hidden_size // settings.num_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "initializer_range": settings.initializer_range,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "dtype": "float32",
    }
