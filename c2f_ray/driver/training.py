"""The loop: prompts, rollouts, rewards, learner, weights.

Invariants: the driver holds ids, lengths, scores and references, never a trajectory's tokens; every sample that was
asked for is learned from exactly once, unless its update was not finite, which is saved aside; engines and learner
hold the same weights when a step ends; a run that was killed goes on from its newest checkpoint.
"""

import copy
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from c2f_ray.algorithms.base import ScoredStep
from c2f_ray.algorithms.registry import algorithm_of
from c2f_ray.data.texts import TrajectoryWriter, unscored_path
from c2f_ray.driver import length as length_control
from c2f_ray.driver.check import Checked
from c2f_ray.driver.checkpoints import RunState, newest_checkpoint, prune_checkpoints, write_checkpoint
from c2f_ray.driver.length import LengthDecision, LengthInputs
from c2f_ray.driver.sampling import Carried, Learning, Rollouts, Sampler
from c2f_ray.errors import (
    ActorDiedError,
    BadRewardError,
    C2FError,
    DeadlineError,
    NonFiniteUpdateError,
    ShardsLostError,
    StepLostError,
)
from c2f_ray.learner.group import LearnerGroup, UpdateBatch
from c2f_ray.recipe import Recipe
from c2f_ray.reward.rewards import Rewards
from c2f_ray.rollout.pool import RolloutPool
from c2f_ray.runtime.placement import Placement
from c2f_ray.runtime.signals import Stopping
from c2f_ray.runtime.trace import Timeline
from c2f_ray.runtime.waiting import wait_for
from c2f_ray.runtime.watchdog import Watchdog
from c2f_ray.watch.metrics import MetricsLog
from c2f_ray.watch.progress import Progress

MAX_UNSAVED = 4  # steps whose trajectories may still be on their way to disk; each keeps its shards in memory


class Training:
    """The actors of one run and its state."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        checked: Checked,
        stack: ExitStack,
        timeline: Timeline,
        placement: Placement,
        progress: Progress,
    ) -> None:
        self.recipe = recipe
        self.stack = stack
        self.placement = placement
        self.timeline = timeline
        self.progress = progress
        self.folder = folder
        self.total_steps = checked.total_steps
        prompts = checked.prompts if checked.heldout is None else checked.prompts + checked.heldout
        self.heldout = range(len(checked.prompts), len(prompts))  # those to train on come first
        self.prompts_dropped = checked.prompts.num_dropped
        self.template = checked.template
        self.prompts = ray.put(prompts)
        self.policy_config = checked.policy_config
        self.resume = checked.resume
        self.state = checked.resume.state if checked.resume else first_state(recipe)
        self.stopping = stack.enter_context(Stopping())
        self.unsaved: RunState | None = None  # after the last step, where no checkpoint has it
        self.saving: deque[Any] = deque()  # references to calls of the writer, oldest first
        self.seconds: dict[str, float] = {}
        self.ahead: Rollouts | None = None  # of the next step, made as the last one learned
        self.carried = [Carried(row, epoch, {}) for row, epoch in self.state.carried]
        self.learned: dict[str, float] | None = None  # metrics of the step's update, once its weights are sent
        max_model_tokens = recipe.prompts.max_tokens + recipe.length.max_tokens
        # All three are told to start before any is waited for.
        self.rollouts = stack.enter_context(
            closing(RolloutPool(recipe, ray.put(prompts.tokens), max_model_tokens, "dummy", timeline, placement))
        )
        self.rewards = stack.enter_context(
            closing(
                Rewards(
                    recipe.reward,
                    recipe.cluster,
                    recipe.policy.model,
                    self.prompts,
                    recipe.run.deterministic,
                    timeline,
                    placement,
                )
            )
        )
        self.sampler = Sampler(
            recipe,
            prompts.ids,
            checked.groups,
            self.recipe.learner.needs_greedy,
            self.rollouts,
            self.rewards,
            self.revive,
            self.timed,
        )
        self.learner = LearnerGroup(recipe, algorithm_of(recipe.learner), checked.total_steps, placement)
        stack.callback(lambda: self.learner.close())  # whichever it is then
        self.connected: list[Any] = []  # the rollout actors that are in the learner's transfer group
        self.learner_restarts_left = recipe.cluster.max_restarts
        watched = [self.rollouts.busy, self.rewards.busy, lambda: self.learner.busy()]
        stack.enter_context(closing(Watchdog(watched, progress.note)))
        self.learner.wait_until_ready()
        self.rollouts.wait_until_ready()
        self.rewards.wait_until_ready()

    def run(self, log: MetricsLog) -> None:
        if self.resume:
            self.progress.stage("loading the checkpoint")
            self.learner.load(self.resume.folder)
        lost: StepLostError | None = None
        done = False
        while not done:
            try:
                if lost:
                    self.restart_learner(lost, log)
                    lost = None
                self.stopping.release()
                self.send_weights()
                self.begin()
                while not self.finished():
                    metrics = self.step()
                    log.write(metrics)
                    self.progress.step(metrics)
                    self.unsaved = copy.deepcopy(self.state)
                    if self.state.step % self.recipe.checkpoints.every_steps == 0 or self.finished():
                        self.progress.stage("checkpoint")
                        with self.timeline.span("driver", self.state.step, "checkpoint"):
                            self.checkpoint()
                    self.stopping.release()
                self.end()
                done = True
            except StepLostError as error:
                if self.learner_restarts_left == 0:
                    raise
                lost, self.unsaved = error, None
            except KeyboardInterrupt:
                self.stop()
                raise

    def stop(self) -> None:
        """Leaves a checkpoint of the last whole step; what was under way of the next one is given up."""
        if self.unsaved:
            self.progress.stage("checkpoint")
            self.state = self.unsaved
            self.checkpoint()
        self.progress.note(
            f"stopped after step {self.state.step} of {self.total_steps}"
            + ("; the same command goes on from there" if self.state.step else "")
        )

    def restart_learner(self, lost: StepLostError, log: MetricsLog) -> None:
        """A new learner goes on from the newest checkpoint; engines and reward workers stay."""
        self.learner_restarts_left -= 1
        self.ahead = None
        self.learner.close()
        self.wait_for_saved_trajectories(0)
        checkpoint, notes = newest_checkpoint(self.folder)
        self.state = checkpoint.state if checkpoint else first_state(self.recipe)
        self.carried = [Carried(row, epoch, {}) for row, epoch in self.state.carried]
        for note in [str(lost), *notes, f"the learner starts again; the run goes on after step {self.state.step}"]:
            self.progress.note(note)
        log.go_back(self.state.step)
        self.learner = LearnerGroup(self.recipe, algorithm_of(self.recipe.learner), self.total_steps, self.placement)
        self.connected = []
        self.learner.wait_until_ready()
        if checkpoint:
            self.learner.load(checkpoint.folder)

    def send_weights(self) -> None:
        """All engines that there are get the learner's weights; what dies on the way is replaced, and joins later.

        Raises StepLostError; what the transfer raised when it fails though every engine answers.
        """
        while True:
            actors = self.rollouts.take_started()
            try:
                if actors != self.connected:
                    self.learner.connect(actors)
                    self.connected = actors
                self.learner.send_weights(self.state.weight_version)
                return
            except StepLostError:
                raise
            except (DeadlineError, RayTaskError):  # told by the rank that sends
                self.connected = []
                if not self.rollouts.replace_dead():
                    raise

    def revive(self) -> None:
        """In the middle of generation no engine is left: new ones start, and get the weights of the old."""
        self.rollouts.wait_until_ready()
        self.send_weights()

    def begin(self) -> None:
        """Before the first step, with the engines' weights in place."""

    def finished(self) -> bool:
        return self.state.step >= self.total_steps

    def end(self) -> None:
        self.progress.stage("exporting the coarse actor")
        self.learner.export(self.folder / "coarse", self.template)

    def step(self) -> dict[str, Any]:
        """One step, as in the module's first line. Returns its metrics."""
        began = time.perf_counter()
        self.seconds = {}
        state = self.state
        rollouts = self.ahead or self.roll_out(state.step + 1, state.position, self.carried)
        self.admit(rollouts)

        batch = self.update_batch(rollouts)
        self.stopping.hold()  # until the end of the step
        self.start_learning(rollouts, batch)
        self.ahead, self.learned = None, None
        if self.recipe.rollout.max_staleness and self.state.step + 1 < self.total_steps:
            learning = Learning(self.has_learned, lambda: self.finish_learning(rollouts))
            self.ahead = self.roll_out(rollouts.step + 1, rollouts.position, rollouts.carried, learning)
        if self.learned is None:
            self.finish_learning(rollouts)
        learned = self.learned
        assert learned is not None
        self.state.position, self.carried = rollouts.position, rollouts.carried
        self.state.carried = [[carried.row, carried.epoch] for carried in rollouts.carried]

        sampled = ~rollouts.info.greedy
        rewards = rollouts.rewards[sampled]
        decision = self.observe(batch, learned)
        self.save(rollouts, self.folder / "trajectories" / f"step_{self.state.step + 1:06d}.parquet")
        self.state.step += 1
        self.state.mean_reward = float(rewards.mean())
        lengths = rollouts.info.response_tokens[sampled]
        seconds = time.perf_counter() - began
        return {
            "step": self.state.step,
            "prompts/dropped": self.prompts_dropped,
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/dropped": rollouts.dropped,
            "time/scores_ready": rollouts.ready,
            **{f"rewards/{name}": value for name, value in rollouts.parts.items()},
            "prompts/left": len(rollouts.carried),
            "length/limit": rollouts.limit,
            "length/mean": float(lengths.mean()),
            "length/max": int(lengths.max()),
            "length/truncated": float((~rollouts.info.finished[sampled]).mean()),
            **{
                f"cm/{name}": value
                for name, value in (asdict(decision) if decision else {}).items()
                if value is not None
            },
            **self.baseline_metric(batch),
            **learned,
            "weights/version": self.state.weight_version,
            "weights/staleness": float(self.state.weight_version - 1 - rollouts.info.weight_version.min()),
            **{f"time/{name}_s": value for name, value in self.seconds.items()},
            "time/other_s": seconds - sum(self.seconds.values()),
            "time/step_s": seconds,
            "time/samples_per_s": len(rollouts.info) / seconds,
        }

    def baseline_metric(self, batch: UpdateBatch) -> dict[str, float]:
        """Returns the mean baseline under the algorithm's own name for it."""
        name = self.recipe.learner.baseline_metric
        return {} if batch.baseline is None or name is None else {name: float(batch.baseline.mean())}

    def admit(self, rollouts: Rollouts) -> None:
        """Only samples of recent weights are learned from."""
        oldest = int(rollouts.info.weight_version.min())
        if self.state.weight_version - oldest > self.recipe.rollout.max_staleness:
            raise C2FError(
                f"a sample of weight version {oldest} reached the learner at version {self.state.weight_version}, and "
                f"rollout.max_staleness is {self.recipe.rollout.max_staleness}"
            )

    def start_learning(self, rollouts: Rollouts, batch: UpdateBatch) -> None:
        self.updating = self.learner.start_update(rollouts.shards, batch)
        self.timeline.span_of_call(self.updating.refs[0], "learner", rollouts.step)  # the ranks end together

    def finish_learning(self, rollouts: Rollouts) -> None:
        """Waits for the update of these, and sends the new weights."""
        with self.timed("learner"):
            self.learned = self.learn(rollouts)
        with self.timed("weights", self.state.step + 1):
            self.state.weight_version += 1
            self.send_weights()

    def has_learned(self) -> bool:
        refs = self.updating.refs
        return len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) == len(refs)

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """The update's metrics. One that is not finite is saved aside with its cause; several in a row end the run."""
        state, learner = self.state, self.recipe.learner
        try:
            learned = self.learner.finish_update(self.updating)
        except NonFiniteUpdateError as error:
            state.bad_updates += 1
            cause = str(getattr(error, "cause", error))  # without the rank's traceback
            aside = self.folder / "aside" / f"step_{state.step + 1:06d}.json"
            aside.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps({"step": state.step + 1, "cause": cause}, indent=1))
            self.save(rollouts, aside.with_suffix(".parquet"))
            if state.bad_updates >= learner.max_bad_updates:
                self.wait_for_saved_trajectories(0)
                raise C2FError(
                    f"{state.bad_updates} updates in a row were not finite, the last of them: {cause}; their "
                    f"samples are in {aside.parent}; lower learner.optimizer.lr, or raise learner.max_bad_updates"
                ) from error
            return {"learner/skipped": 1.0}
        state.bad_updates = 0
        return learned | {"learner/skipped": 0.0}

    def observe(self, batch: UpdateBatch, learned: dict[str, float]) -> LengthDecision | None:
        """The length controller sees the step, unless its update was skipped."""
        if learned["learner/skipped"]:
            return None
        critic = algorithm_of(self.recipe.learner).length_feature(batch, learned)
        inputs = LengthInputs(mean_reward=float(batch.reward.mean()), critic=critic)
        self.state.length, decision = length_control.observe(self.recipe.length, self.state.length, inputs)
        return decision

    def update_batch(self, rollouts: Rollouts) -> UpdateBatch:
        """What the learner needs beside the shards."""
        step = ScoredStep(rollouts.info, self.sampler.prompt_number(rollouts.info), rollouts.rewards)
        seed = [self.recipe.run.seed, self.state.step]
        return algorithm_of(self.recipe.learner).batch(step, self.recipe.learner, seed)

    def roll_out(self, step: int, position: int, carried: list[Carried], learning: Learning | None = None) -> Rollouts:
        limit, last = self.state.length.tokens, step == self.total_steps
        rollouts = self.sampler.step(step, position, carried, limit, last, learning)
        self.refuse_unscored(rollouts)
        return rollouts

    def refuse_unscored(self, rollouts: Rollouts) -> None:
        """Ends the run where the recipe does not go on without samples that got no reward, or where none did."""
        causes = [(shard, cause) for shard in rollouts.scored for cause in shard.causes.values()]
        if len(rollouts.info) and all(shard.drop for shard, _ in causes):
            return
        path = self.folder / "trajectories" / f"step_{rollouts.step:06d}.parquet"
        self.save(rollouts, path)
        self.wait_for_saved_trajectories(0)
        raise BadRewardError(
            f"{len(causes)} responses of step {rollouts.step} got no reward; the first: {causes[0][1]}; they are "
            f"in {unscored_path(path)}; mend the reward, or set its on_failure to drop"
        )

    def checkpoint(self) -> None:
        """Writes one; all that belongs to its steps is on disk before."""
        self.wait_for_saved_trajectories(0)
        write_checkpoint(self.folder, self.state, self.policy_config, self.learner.save)
        keep = self.recipe.checkpoints
        prune_checkpoints(self.folder, keep.keep_last, keep.keep_best)
        self.unsaved = None

    def save(self, rollouts: Rollouts, path: Path) -> None:
        """Starts to write a step's trajectories."""
        self.wait_for_saved_trajectories(MAX_UNSAVED)
        columns, causes = zip(*((shard.columns(), shard.causes) for shard in rollouts.scored), strict=True)
        call = self.writer.write.remote(
            path.absolute(), rollouts.step, self.prompts, rollouts.shards, columns, causes, rollouts.left
        )
        self.saving.append(call)

    @cached_property
    def writer(self) -> Any:
        """Begins where the driver is, and again if it dies."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        actor: Any = ray.remote(TrajectoryWriter)
        writer = actor.options(**options).remote(self.recipe.policy.model, self.recipe.rollout.timeout_s)
        self.stack.callback(ray.kill, writer)
        return writer

    def wait_for_saved_trajectories(self, at_most: int) -> None:
        """Until no more than `at_most` steps are still being written; raises what a writing task raised."""
        # It may have to start first, or to start again.
        timeout_s = self.recipe.cluster.start_timeout_s + self.recipe.rollout.timeout_s
        while len(self.saving) > at_most:
            try:
                wait_for(self.saving.popleft(), timeout_s, "the actor that writes the trajectories")
            except (ActorDiedError, ObjectLostError) as error:
                raise ShardsLostError(f"trajectories were lost with a node before their file was: {error}") from error

    @contextmanager
    def timed(self, stage: str, step: int | None = None) -> Iterator[None]:
        """A stage adds to the step's seconds; with ``step`` it is also that step's span in the timeline."""
        self.progress.stage(stage)
        began = time.perf_counter()
        with self.timeline.span(stage, step) if step is not None else nullcontext():
            yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def first_state(recipe: Recipe) -> RunState:
    return RunState(step=0, position=0, weight_version=0, length=length_control.start(recipe.length))
