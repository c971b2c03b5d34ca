"""Rejection sampling (Merlinite-7B-pt): of each draw the best response, on which the policy is fine-tuned.

Which round is the best, on held-out prompts, is decided in `driver/rounds.py`.
"""

from math import ceil
from statistics import fmean
from typing import Any

import numpy as np

from c2f_ray.algorithms.base import Algorithm, GradientStep, ScoredStep, load_policy
from c2f_ray.data.trajectory import Int64
from c2f_ray.learner.accumulator import MetricsAccumulator
from c2f_ray.learner.batching import Samples, UpdateBatch
from c2f_ray.losses.selection import select
from c2f_ray.recipe import Recipe


class RejectionSampling(Algorithm):
    """The same on every rank but for ``rank``."""

    @staticmethod
    def batch(step: ScoredStep, learner: Any, seed: list[int]) -> UpdateBatch:
        """Returns the responses that the round keeps."""
        kept = select(step.draw, step.reward, seed, learner.min_margin, learner.top_fraction)
        return UpdateBatch(step.info.sample_id[kept], step.reward[kept], None)

    @staticmethod
    def batch_metrics(batch: UpdateBatch) -> dict[str, float]:
        """Returns how many responses were kept, and their mean reward."""
        return {"selection/kept": float(len(batch.reward)), "selection/reward_mean": float(batch.reward.mean())}

    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        learner: Any = recipe.learner
        steps = learner.epochs * ceil(recipe.prompts.per_step / learner.responses_per_update)  # of one round
        self.learner = learner
        self.seed = recipe.run.seed
        self.rank = rank
        self.updates = 0  # rounds done
        self.policy = load_policy(recipe, steps if learner.keeps_start else steps * total_updates)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the models."""
        return {"updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` returned."""
        self.updates = state["updates"]

    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Learns each distinct response ``learner.epochs`` times. Returns the update's metrics."""
        update, self.updates = self.updates, self.updates + 1
        distinct = distinct_rows(samples)
        steps: list[tuple[float, float]] = []
        for epoch in range(self.learner.epochs):
            order = np.random.default_rng([self.seed, update, epoch]).permutation(distinct)
            for start in range(0, len(order), self.learner.responses_per_update):
                steps.append(self._step(samples, order[start : start + self.learner.responses_per_update], metrics))
        totals = metrics.reduce()
        tokens = float(samples.response_tokens[distinct].sum())
        return {
            "learner/loss": totals["loss"] / (tokens * self.learner.epochs),
            "learner/entropy": totals["entropy"] / (tokens * self.learner.epochs),
            "learner/lr": steps[-1][0],
            "learner/grad_norm": fmean(norm for _, norm in steps),
            "learner/steps": len(steps),
            "learner/responses": len(distinct),
            "learner/duplicates": len(samples.sample_id) - len(distinct),
            "learner/tokens": tokens,
            "learner/response_tokens_mean": tokens / len(distinct),
        } | {name: value for name, value in totals.items() if name.startswith("time/")}

    def _step(self, samples: Samples, rows: Int64, metrics: MetricsAccumulator) -> tuple[float, float]:
        """Takes one optimizer step on ``-sum(log pi(a_t)) / tokens``: response tokens only, each of the same weight."""
        step = GradientStep(samples, rows, self.rank, self.learner, metrics)
        for micro, num_chunks in step.micro_batches():
            with metrics.seconds("time/learner_forward_backward_s"):
                logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
                finite = micro.unflatten(logprobs.detach()).isfinite().all(-1)
                loss = -logprobs.sum()
                metrics.add(loss=loss.detach(), entropy=entropy)
                step.backward(self.policy, micro, loss / step.num_tokens, finite)
        return step.step(self.models, "the policy's logprobs")["policy"]


def distinct_rows(samples: Samples) -> Int64:
    """Returns the first row of each distinct pair of prompt and response, ascending."""
    first: dict[tuple[bytes, bytes], int] = {}
    for row in range(len(samples.sample_id)):
        shard, i = samples.shards[samples.shard[row]], int(samples.row[row])
        first.setdefault((shard.prompt[i].tobytes(), shard.response[i].tobytes()), row)
    return np.array(sorted(first.values()), dtype=np.int64)
