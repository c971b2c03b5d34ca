"""UltraRM: a Llama with a linear head, in openbmb/UltraRM-13b's published layout, with its own template.

Source of the layout and the template: the model card of openbmb/UltraRM-13b.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from c2f_ray.data.prompts import Messages
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.recipe import UltraRMReward
from c2f_ray.reward.samples import Encoded, Sample, appends_eos, cut_front

TURNS = {"user": "Human", "assistant": "Assistant"}


class UltraRM(LlamaPreTrainedModel):
    """Keys `model.*` and `regression_head.weight` [1, hidden]; no lm_head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch] of `input_ids` [batch, tokens], padded on either side: the head on the last attended state."""
        ends = attention_mask.cumsum(dim=1)
        # No token sees padding at its right, so that needs no mask, which would cost the fast causal attention.
        unmasked = bool(attention_mask[:, 0].all())
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=None if unmasked else attention_mask,
            position_ids=None if unmasked else (ends - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        last = ends.argmax(dim=1).to(hidden.device)
        return self.regression_head(hidden[torch.arange(len(last)), last]).squeeze(-1)


def load_ultrarm(folder: str, dtype: torch.dtype, device_map: str | None = None) -> UltraRM:
    """Loads a checkpoint, in evaluation mode. Raises ValueError naming any missing or unexpected key."""
    loaded: Any = UltraRM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, output_loading_info=True, use_safetensors=True
    )
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
    def __init__(self, reward: UltraRMReward) -> None:
        self.reward = reward
        self.device = torch.device("cuda" if reward.gpus_per_worker else "cpu")
        self.tokenizer = load_tokenizer(reward.model)
        # Over several GPUs layers are spread evenly, and the hidden states travel.
        device_map = "balanced" if reward.gpus_per_worker > 1 else None
        model: nn.Module = load_ultrarm(reward.model, getattr(torch, reward.dtype), device_map)
        self.model = model if device_map else model.to(self.device)

    def encode(self, sample: Sample) -> Encoded:
        """No text is read as a special token: what a policy wrote can neither end nor begin a conversation."""
        text = render_ultrarm(sample.messages, sample.response, self.reward.separator)
        ids: list[int] = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        while ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers append one by themselves
            ids.pop()
        if appends_eos(self.reward, sample):
            ids = [*ids, self.tokenizer.eos_token_id]
        return cut_front(ids, 0, self.reward.max_tokens, self.tokenizer.bos_token_id)

    @torch.inference_mode()
    def score(self, conversations: list[Encoded]) -> list[float]:
        """The scores of one batch."""
        longest = max(len(encoded.ids) for encoded in conversations)
        ids = torch.zeros(len(conversations), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, encoded in enumerate(conversations):
            ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
            mask[row, : len(encoded.ids)] = 1
        return self.model(ids.to(self.device), mask.to(self.device)).double().tolist()


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
