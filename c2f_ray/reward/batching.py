"""Batches by token budget, across the shards that wait at a worker."""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from c2f_ray.reward.samples import Encoded, score_each


def around_first(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Indices of a batch: the first row, and those nearest to it in length while longest x rows <= ``max_tokens``.

    So the row that has waited longest is always served, and padding is least.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    low = high = bisect_left(order, (lengths[0], 0), key=lambda row: (lengths[row], row))
    while True:
        shorter = lengths[order[low - 1]] if low > 0 else None
        longer = lengths[order[high + 1]] if high + 1 < len(order) else None
        count = high - low + 2
        fits_shorter = shorter is not None and lengths[order[high]] * count <= max_tokens
        fits_longer = longer is not None and longer * count <= max_tokens
        if fits_longer and (not fits_shorter or longer - lengths[0] <= lengths[0] - shorter):
            high += 1
        elif fits_shorter:
            low -= 1
        else:
            return sorted(order[low : high + 1])


@dataclass
class _Row:
    encoded: Encoded
    call: int
    score: "Future[float | str]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """One thread that runs `forward` over what any number of calls of `score` wait for.

    A batch begins when its tokens are there, or `max_wait_s` after its oldest row came. `across_calls=False`: batches
    of one call only, and no wait, so that what is computed together does not depend on time.
    """

    def __init__(
        self, forward: Callable[[list[Encoded]], list[float]], max_tokens: int, max_wait_s: float, across_calls: bool
    ) -> None:
        self.forward = forward
        self.max_tokens = max_tokens
        self.max_wait_s = max_wait_s
        self.across_calls = across_calls
        self.waiting: list[_Row] = []  # oldest first
        self.calls = 0
        self.changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def score(self, conversations: list[Encoded]) -> list[float | str]:
        """For each its score, or the cause why it has none."""
        with self.changed:
            self.calls += 1
            rows = [_Row(encoded, self.calls) for encoded in conversations]
            self.waiting += rows
            self.changed.notify_all()
        return [row.score.result() for row in rows]  # the pool's deadline bounds this

    def _run(self) -> None:
        while True:
            batch = self._next()
            for row, found in zip(batch, score_each(self.forward, [row.encoded for row in batch]), strict=True):
                row.score.set_result(found)

    def _next(self) -> list[_Row]:
        with self.changed:
            self.changed.wait_for(lambda: bool(self.waiting))
            candidates = self.waiting
            if self.across_calls:
                left_s = self.waiting[0].since + self.max_wait_s - time.monotonic()
                self.changed.wait_for(self._enough, timeout=max(0.0, left_s))
                candidates = self.waiting
            else:
                candidates = [row for row in self.waiting if row.call == self.waiting[0].call]
            rows = around_first([len(row.encoded.ids) for row in candidates], self.max_tokens)
            batch = [candidates[row] for row in rows]
            taken = {id(row) for row in batch}
            self.waiting = [row for row in self.waiting if id(row) not in taken]
            return batch

    def _enough(self) -> bool:
        return sum(len(row.encoded.ids) for row in self.waiting) >= self.max_tokens
