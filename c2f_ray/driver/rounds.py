"""Iterative rejection sampling: rounds of best-of-N and fine-tuning, judged on held-out prompts (Merlinite-7B-pt).

Invariants: the held-out prompts are sampled with the same seeds after every round; `coarse/` holds the round whose
held-out reward is the highest so far.
"""

from typing import Any

import numpy as np

from c2f_ray.algorithms.registry import algorithm_of
from c2f_ray.data.atomic import replacing
from c2f_ray.driver import length as length_control
from c2f_ray.driver.length import LengthDecision, LengthInputs
from c2f_ray.driver.sampling import Rollouts
from c2f_ray.driver.training import Training
from c2f_ray.learner.batching import UpdateBatch
from c2f_ray.losses.selection import best_of_draw
from c2f_ray.recipe import RejectionSamplingLearner


class Rounds(Training):
    """A step is a round."""

    @property
    def settings(self) -> RejectionSamplingLearner:
        assert isinstance(self.recipe.learner, RejectionSamplingLearner)
        return self.recipe.learner

    def begin(self) -> None:
        start = self.folder / "start"
        if self.settings.restart_from == "start" and not start.is_dir():
            with replacing(start) as partial:
                partial.mkdir()
                self.learner.save(partial)
        if not self.state.heldout:
            self.state.heldout = [self.judge()["heldout/best_of_n"]]

    def finished(self) -> bool:
        return super().finished() or self.saturated()

    def saturated(self) -> bool:
        """As many rounds as the recipe has patience for have brought nothing."""
        heldout = self.state.heldout
        return len(heldout) - 1 - int(np.argmax(heldout)) >= self.settings.patience

    def end(self) -> None:
        peak = int(np.argmax(self.state.heldout[1:])) + 1
        why = "the held-out reward no longer rises" if self.saturated() else "all rounds are done"
        self.progress.note(f"{why}: round {peak} of {self.state.step} is the coarse actor")

    def step(self) -> dict[str, Any]:
        metrics = super().step()
        metrics |= self.judge()
        reached = metrics["heldout/best_of_n"]
        self.state.mean_reward = reached  # which checkpoint is the best is decided on the held-out prompts
        before = self.state.heldout[1:]
        self.state.heldout.append(reached)
        if not before or reached > max(before):
            self.progress.stage("exporting the best round")
            self.learner.export(self.folder / "coarse", self.template)
        metrics["heldout/before"] = self.state.heldout[0]
        metrics["heldout/peak_round"] = int(np.argmax(self.state.heldout[1:])) + 1
        metrics["heldout/saturated"] = float(self.saturated())
        return metrics

    def judge(self) -> dict[str, float]:
        """Samples the held-out prompts: the mean reward of all responses, and of each prompt's best."""
        rollouts = self.sampler.sample(self.state.step, [(row, 0) for row in self.heldout], self.state.length.tokens)
        self.refuse_unscored(rollouts)
        self.save(rollouts, self.folder / "trajectories" / f"heldout_{self.state.step:06d}.parquet")
        draw = self.sampler.prompt_number(rollouts.info)
        best = best_of_draw(draw, rollouts.rewards, [self.recipe.run.seed])
        return {
            "heldout/reward": float(rollouts.rewards.mean()),
            "heldout/best_of_n": float(rollouts.rewards[best].mean()),
            "heldout/length": float(rollouts.info.response_tokens.mean()),
        }

    def start_learning(self, rollouts: Rollouts, batch: UpdateBatch) -> None:
        if self.settings.restart_from == "start" and self.state.step > 0:
            self.learner.load(self.folder / "start")
        self.kept = algorithm_of(self.recipe.learner).batch_metrics(batch)
        super().start_learning(rollouts, batch)

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        return super().learn(rollouts) | self.kept

    def observe(self, batch: UpdateBatch, learned: dict[str, float]) -> LengthDecision | None:
        """Only a schedule: there is no critic to watch."""
        inputs = LengthInputs(mean_reward=float(batch.reward.mean()), critic=0.0)
        self.state.length, decision = length_control.observe(self.recipe.length, self.state.length, inputs)
        return decision
