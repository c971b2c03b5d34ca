"""How one update's samples are laid out over ranks and micro-batches.

Invariants: every sample is in exactly one micro-batch of one rank; every rank has the same number of micro-batches
(ranks meet in a collective in each); the layout is a pure function of the lengths, ties broken by order.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from c2f_ray.data.trajectory import Int64, Ragged, Trajectories, TrajectoryInfo
from c2f_ray.learner.logprobs import chunks_for
from c2f_ray.learner.packing import layout
from c2f_ray.recipe import LearnerBase

Reference = Callable[..., tuple[Tensor, Tensor]]  # what ResponseLogprobs has, without gradient


@dataclass(frozen=True)
class UpdateBatch:
    """What the driver adds to the shards: N sampled trajectories (greedy rollouts left out), in any order."""

    sample_id: Int64  # [N]
    reward: NDArray[np.float32]  # [N]
    baseline: NDArray[np.float32] | None  # [N] what each reward is compared with; None where there is no baseline
    scale: NDArray[np.float32] | None = None  # [N] what the difference is divided by; None for 1


def split_by_tokens(lengths: Int64, num_ranks: int) -> list[Int64]:
    """Rows for each rank, ascending: the longest row left goes to the rank with the fewest tokens (Graham's LPT rule).

    ``lengths`` [N] in tokens. No two ranks differ by more tokens than the longest row has, and the largest has at
    most 4/3 of what it would have in the best possible split (Graham 1969).
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in np.argsort(-lengths, kind="stable"):
        tokens, rank = heapq.heappop(loads)
        rows[rank].append(int(row))
        heapq.heappush(loads, (tokens + int(lengths[row]), rank))
    return [np.array(sorted(part), dtype=np.int64) for part in rows]


def micro_batches(lengths: Int64, max_tokens: int) -> list[Int64]:
    """Rows of similar length together, longest first, with at most ``max_tokens`` = longest x rows, padding included.

    A row longer than ``max_tokens`` is a micro-batch of its own.
    """
    batches: list[list[int]] = []
    for row in np.argsort(-lengths, kind="stable"):
        if batches and int(lengths[batches[-1][0]]) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(int(row))
        else:
            batches.append([int(row)])
    return [np.array(batch, dtype=np.int64) for batch in batches]


def plan(lengths: Int64, num_ranks: int, max_tokens: int, *, packing: bool = False) -> list[list[Int64]]:
    """``[rank][micro-batch] -> rows`` of ``lengths`` [N].

    As many micro-batches as the rank that needs most, on all ranks, and as even as they can be: that shrinks the
    largest, and with it padding and the time that ranks wait for each other in every micro-batch's collective.
    """
    parts = split_by_tokens(lengths, num_ranks)
    if packing:
        count = max(num_packs(lengths[rows], max_tokens) for rows in parts)
        return [[rows[pack] for pack in split_by_tokens(lengths[rows], count)] for rows in parts]
    count = max(len(micro_batches(lengths[rows], max_tokens)) for rows in parts)
    return [[rows[batch] for batch in even_micro_batches(lengths[rows], max_tokens, count)] for rows in parts]


def num_packs(lengths: Int64, max_tokens: int) -> int:
    """The fewest parts of ``split_by_tokens`` that have at most ``max_tokens`` each, but for a longer row by itself."""
    tokens = np.minimum(lengths, max_tokens)
    count = max(1, -(-int(tokens.sum()) // max_tokens))
    while max(int(tokens[rows].sum()) for rows in split_by_tokens(tokens, count)) > max_tokens:
        count += 1
    return count


def even_micro_batches(lengths: Int64, max_tokens: int, count: int) -> list[Int64]:
    """Exactly ``count``, at the smallest size in padded tokens that needs no more; empty ones where rows run out."""
    size = bisect_left(range(max_tokens), -count, key=lambda tokens: -len(micro_batches(lengths, tokens)))
    batches = micro_batches(lengths, size)
    while len(batches) < min(count, len(lengths)):
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = (len(batches[largest]) + 1) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    return batches + [np.empty(0, dtype=np.int64)] * (count - len(batches))


@dataclass(frozen=True)
class MicroBatch:
    """B trajectories padded at the right to S tokens, and to T response tokens; R response tokens together.

    Padding is zero, and nothing reads it. Packed, the trajectories lie in one row of S tokens, one after the other.
    Without rows the model's inputs have one row of nothing but padding: a rank that has run out of samples still meets
    the others in the collectives.
    """

    rows: Int64  # [B] of the update's samples
    input_ids: Tensor  # int64 [B, S]; packed, [1, S]
    predicts: Tensor  # bool, the same: the next token is a response token
    targets: Tensor  # int64 [R]: the response tokens, row by row
    mask: Tensor  # bool [B, T]: response tokens
    sampler_logprobs: Tensor  # float32 [R]
    packing: dict[str, Any]  # what a packed model takes beside them

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What ``ResponseLogprobs`` takes first."""
        return self.input_ids, self.predicts, self.targets

    def to(self, device: torch.device) -> "MicroBatch":
        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(part) for name, part in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def unflatten(self, values: Tensor) -> Tensor:
        """[R] to [B, T], zero outside the mask; keeps the gradient."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


class Samples:
    """The sampled trajectories of all shards, greedy rollouts left out, read in place.

    Row i has the i-th smallest sample id, so the order in which shards arrived leaves no trace.
    """

    def __init__(self, shards: Sequence[Trajectories], *, packing: bool = False, only: Int64 | None = None) -> None:
        """``only``: sample ids to leave out all others."""
        info = TrajectoryInfo.concat([shard.info for shard in shards])
        order = np.argsort(info.sample_id, kind="stable")
        order = order[~info.greedy[order]]
        if only is not None:
            order = order[np.isin(info.sample_id[order], only)]
        self.packing = packing
        self.shards = shards
        self.shard = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])[order]
        self.row = np.concatenate([np.arange(len(shard)) for shard in shards])[order]
        self.sample_id: Int64 = info.sample_id[order]
        self.response_tokens: Int64 = info.response_tokens[order].astype(np.int64)
        self.lengths: Int64 = info.prompt_tokens[order] + self.response_tokens  # in tokens

    def tokens_of(self, rows: Int64) -> Tensor:
        """Where the response tokens of these rows are among those of all, row after row; int64 [R]."""
        ends = np.cumsum(self.response_tokens)
        spans = [np.arange(ends[row] - self.response_tokens[row], ends[row]) for row in rows]
        return torch.from_numpy(np.concatenate([*spans, np.empty(0, np.int64)]))

    def _join(self, name: str, rows: Int64) -> Ragged:
        parts = [getattr(self.shards[self.shard[row]], name)[self.row[row]] for row in rows]
        return Ragged.from_rows(parts, getattr(self.shards[0], name).values.dtype.type)

    def micro_batch(self, rows: Int64) -> MicroBatch:
        """Copies these rows, and no others, into tensors on the CPU."""
        prompt, response = self._join("prompt", rows), self._join("response", rows)
        prompt_end = prompt.lengths.reshape(-1, 1) if len(rows) else np.zeros((1, 1), np.int64)
        end = prompt_end + (response.lengths.reshape(-1, 1) if len(rows) else 0)
        position = np.arange(max(1, end.max()))
        is_response = (position >= prompt_end) & (position < end)
        input_ids = np.zeros(is_response.shape, dtype=np.int64)
        input_ids[position < prompt_end] = prompt.values
        input_ids[is_response] = response.values
        predicts = np.roll(is_response, -1, axis=1)
        packing: dict[str, Any] = {}
        if self.packing:
            lengths = np.maximum(1, end)  # without rows there is one token
            kept = position < lengths
            input_ids, predicts = input_ids[kept][None], predicts[kept][None]
            packing = layout(torch.from_numpy(lengths.flatten()))
        return MicroBatch(
            rows=rows,
            input_ids=torch.from_numpy(input_ids),
            predicts=torch.from_numpy(predicts),
            targets=torch.from_numpy(response.values.astype(np.int64)),
            mask=torch.from_numpy(np.arange((end - prompt_end).max()) < end - prompt_end)[: len(rows)],
            sampler_logprobs=torch.from_numpy(self._join("sampler_logprobs", rows).values),
            packing=packing,
        )


def rank_plan(samples: Samples, rows: Int64, rank: int, learner: LearnerBase) -> list[tuple[Int64, int]]:
    """One rank's micro-batches of ``rows``: (rows, chunks of the output layer, as many as the rank with most needs)."""
    parts = plan(samples.lengths[rows], learner.ranks, learner.tokens_per_microbatch, packing=samples.packing)
    ranks = [[rows[part] for part in micro] for micro in parts]
    most = [max(samples.response_tokens[part].sum() for part in together) for together in zip(*ranks, strict=True)]
    return [(part, chunks_for(int(tokens))) for part, tokens in zip(ranks[rank], most, strict=True)]
