"""How likely held-out texts are to a model, and how far it is from the instruct model, by plain forwards.

Invariant: logits exist in float32 for ``CHUNK_TOKENS`` tokens at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from c2f_ray.data.trajectory import Ragged, Trajectories
from c2f_ray.learner.logprobs import chunks_for
from c2f_ray.runtime.waiting import wait_for

Row = tuple[NDArray[np.generic], int]  # token ids, and the position of the first one that is predicted
PerToken = Callable[[list[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Forward:
    """How a model is loaded and run."""

    dtype: str
    gpus: int  # over which its layers are spread; 0: the CPU
    tokens_per_batch: int  # longest row times rows, padding included


def text_windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], window_tokens: int) -> Ragged:
    """The texts' token ids, int32, those of longer ones cut into windows: each predicts all its tokens but the first.

    A window of one token predicts nothing and is left out.
    """
    windows: list[list[int]] = []
    for text in texts:
        ids: list[int] = tokenizer(text)["input_ids"]
        windows += [ids[start : start + window_tokens] for start in range(0, len(ids), window_tokens)]
    return Ragged.from_rows([window for window in windows if len(window) > 1], np.int32)


def likelihoods(
    folder: str, instruct: str | None, forward: Forward, windows: Ragged | None, shards: list[Any], timeout_s: float
) -> dict[str, float]:
    """A model's `perplexity` on `windows`, and `kl_to_instruct` over the responses in `shards`, object references.

    Perplexity: exp of the mean negative log probability of a token, in nats, over all texts together.
    KL(model || instruct), over the whole vocabulary, in nats per token: its mean over the response tokens, given what
    the model wrote before each of them. Columns of the vocabulary that one of the two has not are left out.
    """
    model = _load(folder, forward)
    found: dict[str, float] = {}
    if windows is not None:
        rows = [(windows[row], 1) for row in range(len(windows))]
        found["perplexity"] = math.exp(_mean_over_tokens([model], rows, _surprise, forward.tokens_per_batch))
    if instruct is not None:
        read: list[Trajectories] = wait_for(shards, timeout_s, f"the responses of {folder}")
        rows = [
            (np.concatenate([shard.prompt[i], shard.response[i]]), len(shard.prompt[i]))
            for shard in read
            for i in range(len(shard))
        ]
        models = [model, _load(instruct, forward)]
        found["kl_to_instruct"] = _mean_over_tokens(models, rows, _divergence, forward.tokens_per_batch)
    return found


def _load(folder: str, forward: Forward) -> PreTrainedModel:
    device_map = "auto" if forward.gpus else None
    dtype = getattr(torch, forward.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, use_safetensors=True)
    return model.eval()


@torch.inference_mode()
def _mean_over_tokens(models: list[Any], rows: list[Row], per_token: PerToken, tokens_per_batch: int) -> float:
    """The mean of `per_token` over all predicted tokens of the rows.

    It is given the logits of each model, [chunk, vocabulary], and the ids of the tokens that they predict, [chunk].
    """
    total, count = 0.0, 0
    for ids, predicts, targets in _batches(rows, tokens_per_batch):
        # Padded at the right, where a causal model cannot see it, so no attention mask.
        states = [
            model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state for model in models
        ]
        num_chunks = chunks_for(len(targets))
        chunks = [state[predicts.to(state.device)].tensor_split(num_chunks) for state in states]
        for *parts, target in zip(*chunks, targets.tensor_split(num_chunks), strict=True):
            logits = [model.get_output_embeddings()(part) for model, part in zip(models, parts, strict=True)]
            total += per_token(logits, target.to(logits[0].device)).double().sum().item()
        count += len(targets)
    return total / count


def _batches(rows: list[Row], tokens_per_batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``ids`` int64 [B, S], longest first; ``predicts`` bool [B, S], the positions whose next token counts; and these
    tokens, int64 [R], in row-major order.
    """
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row][0]), row))
    while order:
        longest = len(rows[order[0]][0])
        count = max(1, tokens_per_batch // longest)
        batch, order = order[:count], order[count:]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        predicts = torch.zeros(len(batch), longest, dtype=torch.bool)
        for i, row in enumerate(batch):
            tokens, first = rows[row]
            ids[i, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            predicts[i, first - 1 : len(tokens) - 1] = True
        yield ids, predicts, ids.roll(-1, dims=1)[predicts]


def _surprise(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Negative log probability of each target, [chunk]."""
    return -log_softmax(logits[0].float(), dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def _divergence(logits: list[Tensor], targets: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)), [chunk]."""
    shared = min(part.shape[-1] for part in logits)
    p, q = (log_softmax(part[:, :shared].to(logits[0].device).float(), dim=-1) for part in logits)
    return (p.exp() * (p - q)).sum(-1)
