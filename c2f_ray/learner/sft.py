"""Supervised fine-tuning on the responses that a round of rejection sampling has kept."""

from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from c2f_ray.data.trajectory import Int64
from c2f_ray.learner.batching import Samples, UpdateBatch, rank_plan
from c2f_ray.learner.finite import on_all_ranks, refuse_norm, refuse_samples
from c2f_ray.learner.tally import Tally
from c2f_ray.recipe.schema import RejectionSamplingLearner

if TYPE_CHECKING:  # it imports DeepSpeed
    from c2f_ray.learner.engine import TrainedModel


class SFT:
    """The same on every rank but for ``rank``."""

    def __init__(self, learner: RejectionSamplingLearner, seed: int, rank: int, policy: "TrainedModel") -> None:
        self.learner = learner
        self.seed = seed
        self.rank = rank
        self.policy = policy
        self.updates = 0  # rounds done

    @property
    def models(self) -> dict[str, "TrainedModel"]:
        return {"policy": self.policy}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the models."""
        return {"updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def update(self, samples: Samples, batch: UpdateBatch, tally: Tally) -> dict[str, float]:
        """Learns each distinct response ``learner.epochs`` times. Returns the update's metrics."""
        update, self.updates = self.updates, self.updates + 1
        distinct = distinct_rows(samples)
        steps: list[tuple[float, float]] = []
        for epoch in range(self.learner.epochs):
            order = np.random.default_rng([self.seed, update, epoch]).permutation(distinct)
            for start in range(0, len(order), self.learner.responses_per_update):
                steps.append(self._step(samples, order[start : start + self.learner.responses_per_update], tally))
        totals = tally.reduce()
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

    def _step(self, samples: Samples, rows: Int64, tally: Tally) -> tuple[float, float]:
        """One optimizer step on ``-sum(log pi(a_t)) / tokens``: response tokens only, each of the same weight."""
        num_tokens = int(samples.response_tokens[rows].sum())
        micro_batches = rank_plan(samples, rows, self.rank, self.learner)
        bad: list[int] = []
        for i, (part, num_chunks) in enumerate(micro_batches):
            micro = samples.micro_batch(part).to(tally.device)
            with tally.seconds("time/learner_forward_backward_s"):
                logprobs, entropy = self.policy.engine(*micro.inputs, num_chunks, **micro.packing)
                finite = micro.unflatten(logprobs.detach()).isfinite().all(-1).cpu().numpy()
                bad += samples.sample_id[part[~finite]].tolist()
                last = i == len(micro_batches) - 1
                loss = -logprobs.sum()
                tally.add(loss=loss.detach(), entropy=entropy)
                if last and (bad := on_all_ranks(bad)):
                    loss = loss * torch.nan  # then DeepSpeed discards the whole gradient
                self.policy.backward(loss / num_tokens, last=last)
        with tally.seconds("time/learner_step_s"):
            lr, norm = self.policy.step()
        refuse_samples(bad, "the policy's logprobs")
        refuse_norm(norm, "policy", samples.sample_id[rows])
        return lr, norm


def distinct_rows(samples: Samples) -> Int64:
    """The first row of each distinct pair of prompt and response, ascending."""
    first: dict[tuple[bytes, bytes], int] = {}
    for row in range(len(samples.sample_id)):
        shard, i = samples.shards[samples.shard[row]], int(samples.row[row])
        first.setdefault((shard.prompt[i].tobytes(), shard.response[i].tobytes()), row)
    return np.array(sorted(first.values()), dtype=np.int64)
