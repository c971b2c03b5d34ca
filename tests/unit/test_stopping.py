"""A signal ends a run at once, or when what cannot be taken back is done."""

import os
import pickle
import signal
import threading
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from c2f_ray.driver.training import Training, first_state
from c2f_ray.errors import LearnerLostError, StepLostError, StoppedError
from c2f_ray.recipe import load_recipe
from c2f_ray.runtime.signals import Stopping


def test_at_once_when_nothing_is_held():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as stopped, Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert 128 + stopped.value.signal == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert pickle.loads(pickle.dumps(stopped.value)).signal == signal.SIGTERM


def test_what_is_held_is_finished_first():
    done = []
    with pytest.raises(StoppedError), Stopping() as stopping:
        stopping.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("update")
        stopping.release()
        done.append("next step")
    assert done == ["update"]


def test_a_second_term_does_not_disturb_the_last_checkpoint_and_a_second_ctrl_c_does():
    done = []
    with pytest.raises(StoppedError) as stopped, Stopping():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("half of the checkpoint")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
    assert done == ["half of the checkpoint"]
    assert stopped.value.signal == signal.SIGINT


def test_a_closed_terminal_stops_a_run_too():
    with pytest.raises(StoppedError, match="stopped by SIGHUP; run the same command again"), Stopping():
        os.kill(os.getpid(), signal.SIGHUP)
        signal.pause()


def test_other_errors_and_calm_runs_pass_through():
    with pytest.raises(ValueError, match="its own"), Stopping() as stopping:
        stopping.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("its own")
    with Stopping() as stopping:
        stopping.hold()
        stopping.release()


def test_in_another_thread_signals_are_left_alone():
    found = []

    def run() -> None:
        with Stopping():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == [signal.getsignal(signal.SIGTERM)]


class FakeTraining(Training):
    """The loop, with steps that only count; `happens` is called in rollouts and in updates."""

    def __init__(self, stack: ExitStack, happens: Any) -> None:
        self.recipe = load_recipe(Path(__file__).parents[2] / "configs/tiny.yaml", "checkpoints.every_steps=3")
        self.total_steps = 6
        self.state = first_state(self.recipe)
        self.resume = None
        self.learner_restarts_left = 1
        self.stopping = stack.enter_context(Stopping())
        self.unsaved = None
        self.timeline: Any = SimpleNamespace(span=lambda *_: nullcontext())
        self.happens = happens
        self.kept: list[tuple[int, int]] = []  # step and position of each checkpoint

    def send_weights(self) -> None: ...
    def end(self) -> None: ...
    def restart_learner(self, *_: Any) -> None:
        self.learner_restarts_left -= 1
        if self.kept:
            self.state.step, self.state.position = self.kept[-1]

    def step(self) -> dict[str, Any]:
        self.state.position += 8
        self.happens("rollout", self.state.step + 1)
        self.stopping.hold()
        self.happens("update", self.state.step + 1)
        self.state.step += 1
        return {}

    def checkpoint(self) -> None:
        self.kept.append((self.state.step, self.state.position))
        self.unsaved = None


def run(happens: Any) -> tuple[list[tuple[int, int]], str]:
    """The checkpoints, and the last line that the run printed."""
    notes = []
    silent = SimpleNamespace(stage=lambda _: None, step=lambda _: None, note=notes.append, write=lambda _: None)
    with pytest.raises(StoppedError), ExitStack() as stack:
        training: Any = FakeTraining(stack, happens)
        training.progress = silent
        training.run(silent)
    return training.kept, notes[-1]


def test_a_learner_that_is_lost_more_often_than_max_restarts_ends_the_run():
    losses = []

    def happens(at: str, now: int) -> None:
        losses.append(now)
        raise StepLostError("a rank died")

    silent = SimpleNamespace(stage=lambda _: None, step=lambda _: None, note=lambda _: None, write=lambda _: None)
    with pytest.raises(StepLostError, match="a rank died"), ExitStack() as stack:
        training: Any = FakeTraining(stack, happens)
        training.progress = silent
        training.run(silent)
    assert losses == [1, 1], "one restart is left at the start"


@pytest.mark.parametrize(
    ("where", "step", "kept"),
    [
        ("rollout", 1, []),  # nothing is done yet
        ("rollout", 3, [(2, 16)]),  # its prompts will be drawn again
        ("rollout", 4, [(3, 24)]),  # the checkpoint that was due is there already
        ("update", 2, [(2, 16)]),  # which cannot be taken back
        ("update", 3, [(3, 24)]),
    ],
)
def test_the_last_whole_step_is_kept_once(where: str, step: int, kept: list[tuple[int, int]]):
    def happens(at: str, now: int) -> None:
        if (at, now) == (where, step):
            os.kill(os.getpid(), signal.SIGTERM)

    last = kept[-1][0] if kept else 0
    goes_on = "; the same command goes on from there" if kept else ""
    assert run(happens) == (kept, f"stopped after step {last} of 6{goes_on}")


def test_of_a_learner_that_was_lost_nothing_is_kept():
    def happens(at: str, now: int) -> None:
        if (at, now) == ("update", 5):
            os.kill(os.getpid(), signal.SIGTERM)
            raise LearnerLostError("rank 0")

    assert run(happens) == ([(3, 24)], "stopped after step 3 of 6; the same command goes on from there")
