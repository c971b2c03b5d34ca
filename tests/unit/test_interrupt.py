"""The rollout actor's `generate` and `interrupt`, with an engine that needs no model: token n of each request is n."""

from types import SimpleNamespace

import numpy as np
import pytest

from c2f_ray.adapters.vllm import Completion
from c2f_ray.data.trajectory import Ragged, Trajectories
from c2f_ray.rollout import actor
from c2f_ray.rollout.actor import RolloutActor, RolloutRequest


class CountingRequests:
    """Finishes request i after i + 1 steps; `at_step` runs before each step."""

    at_step = staticmethod(lambda step: None)

    def __init__(self, llm: object, *, interruptible: bool) -> None:
        self.running: dict[int, int] = {}
        self.steps = 0

    def add(self, number: int, prompt: list[int], max_tokens: int, **sampling: object) -> None:
        self.running[number] = max_tokens

    def step(self) -> list[Completion]:
        self.at_step(self.steps)
        self.steps += 1
        done = [number for number in self.running if number < self.steps]
        return [self._part(number, self.running.pop(number) and "stop") for number in done]

    def interrupt(self) -> list[Completion]:
        parts = [self._part(number, "abort") for number in self.running]
        self.abort()
        return parts

    def abort(self) -> None:
        self.running.clear()

    def _part(self, number: int, reason: str) -> Completion:
        return Completion(number, list(range(self.steps)), [-0.5] * self.steps, reason)


@pytest.fixture
def engine(monkeypatch) -> RolloutActor:
    monkeypatch.setattr(actor, "Requests", CountingRequests)
    monkeypatch.setattr(CountingRequests, "at_step", staticmethod(lambda step: None))
    rollout = SimpleNamespace(shard_samples=2, timeout_s=60.0, temperature=1.0, top_p=1.0)
    prompts = Ragged.from_rows([[1, 2]], np.int32)
    return RolloutActor(None, rollout, prompts, 64, "auto")


def lengths(engine: RolloutActor, call: int | None) -> tuple[list[int], list[int]]:
    """Tokens of the samples that were interrupted, and of those that were not."""
    requests = [RolloutRequest(number, 0, number, False) for number in range(6)]
    shards = [item for item in engine.generate(requests, 10, True, call) if isinstance(item, Trajectories)]
    batch = Trajectories.concat(shards)
    assert sorted(batch.info.sample_id.tolist()) == list(range(6))
    tokens = batch.info.response_tokens
    return sorted(tokens[batch.info.interrupted].tolist()), sorted(tokens[~batch.info.interrupted].tolist())


def test_an_interruption_keeps_what_each_sample_has(engine, monkeypatch):
    monkeypatch.setattr(CountingRequests, "at_step", staticmethod(lambda step: step == 2 and engine.interrupt(1)))
    assert lengths(engine, 1) == ([3, 3, 3], [1, 2, 3])


def test_an_interruption_before_the_call_begins_counts(engine):
    engine.interrupt(1)
    assert lengths(engine, 1) == ([1] * 5, [1])


def test_an_interruption_of_an_earlier_call_does_not_end_a_later_one(engine, monkeypatch):
    engine.interrupt(1)
    monkeypatch.setattr(CountingRequests, "at_step", staticmethod(lambda step: engine.interrupt(1)))
    assert lengths(engine, 2) == ([], [1, 2, 3, 4, 5, 6])


def test_a_call_without_a_number_is_never_interrupted(engine):
    engine.interrupt(1)
    assert lengths(engine, None) == ([], [1, 2, 3, 4, 5, 6])


def test_an_interruption_that_comes_late_leaves_an_earlier_number_behind(engine):
    engine.interrupt(2)
    engine.interrupt(1)
    assert lengths(engine, 2)[0] == [1] * 5
