"""Accumulates what one rank counts and times during an update, and reduces it over all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from c2f_ray.learner.batching import MicroBatch, Samples


class MetricsAccumulator:
    """Named sums, maxima and seconds. Every rank must name the same ones in the same order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}  # float64 scalars
        self._maxima: dict[str, Tensor] = {}  # float64 scalars
        self._seconds: dict[str, float] = {}

    def add(self, **values: Tensor | float) -> None:
        """Adds the sum of all elements to each name's total."""
        for name, value in values.items():
            value = torch.as_tensor(value, device=self.device).sum(dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def peak(self, name: str, values: Tensor) -> None:
        """Keeps the largest element seen, at least 0. ``values`` may be empty."""
        before = self._maxima.get(name, torch.zeros((), dtype=torch.float64, device=self.device))
        self._maxima[name] = torch.cat([values.flatten().double(), before.view(1)]).max()

    def rollout(self, micro: MicroBatch, logprobs: Tensor, entropy: Tensor, kl: Tensor, weights: Tensor) -> None:
        """What ``rollout_metrics`` needs of each micro-batch, once in an update, at rollout weights; [R] each."""
        gap = (logprobs - micro.sampler_logprobs).abs()
        self.add(kl=kl, entropy=entropy, gap=gap, padded=micro.input_ids.numel())
        self.add(weights=weights, squared_weights=weights.double().square())
        self.peak("gap_max", gap)
        self.peak("weights_max", weights)

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        start = self._clock()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reduce(self) -> dict[str, float]:
        """Sums over the ranks, maxima and seconds of the rank with most. A collective."""
        sums = torch.stack(list(self._sums.values()))
        seconds = torch.tensor(list(self._seconds.values()), dtype=torch.float64, device=self.device)
        maxima = torch.stack([*self._maxima.values(), *seconds])
        distributed.all_reduce(sums, distributed.ReduceOp.SUM)
        distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
        names = [*self._sums, *self._maxima, *self._seconds]
        return dict(zip(names, torch.cat([sums, maxima]).tolist(), strict=True))


def rollout_metrics(totals: dict[str, float], samples: Samples, *, has_reference: bool) -> dict[str, float]:
    """The metrics that every algorithm has, from what ``reduce`` returned, and the seconds."""
    tokens, responses = float(samples.response_tokens.sum()), len(samples.sample_id)
    metrics = {
        "learner/entropy": totals["entropy"] / tokens,  # nats, of the distribution before temperature and top_p
        "learner/tokens": tokens,  # response tokens
        "learner/response_tokens_mean": tokens / responses,
        "learner/padding_waste": 1.0 - float(samples.lengths.sum()) / totals["padded"],  # of the tokens computed
        "logprob_gap/mean": totals["gap"] / tokens,  # |learner - sampler|
        "logprob_gap/max": totals["gap_max"],
        "importance/mean": totals["weights"] / tokens,  # of the tokens' weights, truncated where the recipe says so
        "importance/max": totals["weights_max"],
        "importance/effective": totals["weights"] ** 2 / (tokens * totals["squared_weights"]),  # share of the sample
    }
    if has_reference:
        metrics["kl/sequence"] = totals["kl"] / responses  # nats, summed over a response's tokens
        metrics["kl/token"] = totals["kl"] / tokens
    return metrics | {name: value for name, value in totals.items() if name.startswith("time/")}
