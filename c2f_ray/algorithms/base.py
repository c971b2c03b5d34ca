"""What all algorithms share: their interface, the models of a rank, and the gradient of one optimizer step.

An algorithm has two sides. The driver asks which samples of a step are learned from; it knows ids, lengths and rewards
and no tokens. Every rank of the learner holds an instance, whose `update` learns from those samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from c2f_ray.data.trajectory import Float32, Int64, TrajectoryInfo
from c2f_ray.learner.accumulator import MetricsAccumulator
from c2f_ray.learner.batching import MicroBatch, Reference, Samples, UpdateBatch, rank_plan
from c2f_ray.learner.finite import on_all_ranks, refuse_norm, refuse_samples
from c2f_ray.losses.baselines import reward_spread
from c2f_ray.recipe import LearnerBase, Optimizer, Recipe

if TYPE_CHECKING:  # it imports DeepSpeed
    from c2f_ray.learner.engine import TrainedModel


@dataclass(frozen=True)
class ScoredStep:
    """The N trajectories of a step that have a reward, by sample id. No tokens."""

    info: TrajectoryInfo
    draw: Int64  # [N] number of the sample's prompt among those of the step; a row may be drawn twice
    reward: Float32  # [N]


class Algorithm(ABC):
    """One algorithm. What others must know of it beside this is on its config section."""

    policy: "TrainedModel"

    @staticmethod
    def batch(step: ScoredStep, learner: Any, seed: list[int]) -> UpdateBatch:
        """Returns the samples to learn from, with their rewards and baselines: here all that are not greedy.

        ``seed`` is that of the run and the step.
        """
        sampled = ~step.info.greedy
        return UpdateBatch(step.info.sample_id[sampled], step.reward[sampled], None)

    @staticmethod
    def length_feature(batch: UpdateBatch, metrics: Mapping[str, float]) -> float:
        """Returns what a length rule observes beside the mean reward: how far critic or baseline are from the rewards.

        0 without either, which rules that observe nothing take.
        """
        if batch.baseline is not None:
            return reward_spread(batch.reward, batch.baseline)
        return metrics.get("critic/loss", 0.0)

    @staticmethod
    def batch_metrics(batch: UpdateBatch) -> dict[str, float]:
        """Returns metrics of the choice that `batch` made."""
        return {}

    @abstractmethod
    def __init__(self, recipe: Recipe, rank: int, total_updates: int) -> None:
        """Loads the models on one rank, all ranks together. ``total_updates`` of the whole run."""

    @property
    def models(self) -> dict[str, "TrainedModel"]:
        """Returns what a checkpoint keeps of models, by the prefix of its files."""
        return {"policy": self.policy}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the models, all JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 (most keep nothing)
        """Takes what ``state`` returned."""

    @abstractmethod
    def update(self, samples: Samples, batch: UpdateBatch, metrics: MetricsAccumulator) -> dict[str, float]:
        """Learns from one step; returns the update's metrics, the same on every rank.

        ``batch`` has the rows of ``samples``. Raises NonFiniteUpdateError on every rank.
        """


def load_policy(recipe: Recipe, total_steps: int, *, entropy_gradient: bool = False) -> "TrainedModel":
    """Loads the policy, with an optimizer that takes ``total_steps`` in the whole run."""
    from c2f_ray.learner import engine

    module = engine.load_policy(recipe.policy, recipe.learner, entropy_gradient=entropy_gradient)
    return engine.TrainedModel(module, recipe.learner, recipe.learner.optimizer, total_steps)


def load_critic(recipe: Recipe, optimizer: Optimizer, total_steps: int) -> "TrainedModel":
    """Loads the critic, with an optimizer that takes ``total_steps`` in the whole run."""
    from c2f_ray.learner import engine

    assert recipe.critic_model is not None  # the algorithm has one
    module = engine.load_critic(recipe.critic_model, recipe.policy, recipe.learner)
    return engine.TrainedModel(module, recipe.learner, optimizer, total_steps)


def load_reference(recipe: Recipe, policy: "TrainedModel") -> Reference | None:
    """Loads the policy that the run started from, frozen, where a KL penalty needs it."""
    from c2f_ray.learner import engine

    if not recipe.learner.has_reference:
        return None
    if recipe.learner.lora is not None:
        from c2f_ray.learner.lora import without_adapters

        return without_adapters(policy.engine)
    return engine.frozen(engine.load_policy(recipe.policy, recipe.learner), recipe.learner)


class GradientStep:
    """One optimizer step on some rows of the samples: this rank's micro-batches, their losses, and the step.

    Invariant: where any rank meets a loss that is not finite the last micro-batch's gradient becomes NaN on all of
    them, so that DeepSpeed discards the whole of it.
    """

    def __init__(
        self, samples: Samples, rows: Int64, rank: int, learner: LearnerBase, metrics: MetricsAccumulator
    ) -> None:
        self.samples = samples
        self.rows = rows
        self.metrics = metrics
        self.num_tokens = int(samples.response_tokens[rows].sum())  # of all ranks
        self._plan = rank_plan(samples, rows, rank, learner)
        self._is_last = False
        self._bad: set[int] = set()  # sample ids

    def micro_batches(self) -> Iterator[tuple[MicroBatch, int]]:
        """Yields each micro-batch on the device, and the chunks of its output layer."""
        for i, (rows, num_chunks) in enumerate(self._plan):
            self._is_last = i == len(self._plan) - 1
            yield self.samples.micro_batch(rows).to(self.metrics.device), num_chunks

    def backward(self, model: "TrainedModel", micro: MicroBatch, loss: Tensor, finite: Tensor) -> None:
        """Adds a micro-batch's part of the loss, a scalar, to the model's gradient. ``finite`` bool [B], by row."""
        self._bad.update(self.samples.sample_id[micro.rows[~finite.cpu().numpy()]].tolist())
        if self._is_last:
            self._bad.update(on_all_ranks(sorted(self._bad)))
            loss = loss * torch.nan if self._bad else loss
        model.backward(loss, last=self._is_last)

    def step(self, models: Mapping[str, "TrainedModel"], checked: str) -> dict[str, tuple[float, float]]:
        """Takes the step of each model; returns its learning rate and the gradient's norm before clipping, by name.

        Raises NonFiniteUpdateError on every rank where a loss or a norm is not finite; then no model has changed
        whose gradient was not finite. ``checked`` names what the losses were made of.
        """
        with self.metrics.seconds("time/learner_step_s"):
            taken = {name: model.step() for name, model in models.items()}
        refuse_samples(sorted(self._bad), checked)
        for name, (_, norm) in taken.items():
            refuse_norm(norm, name, self.samples.sample_id[self.rows])
        return taken
