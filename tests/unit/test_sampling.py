"""What of a step's samples has come, what is waited for, and what the next step gets."""

from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from c2f_ray.data.trajectory import TrajectoryInfo
from c2f_ray.driver.sampling import _Arrived, with_reward
from c2f_ray.reward.rewards import ScoredShard
from c2f_ray.rollout import actor
from c2f_ray.rollout.actor import Begun, RolloutActor, RolloutRequest

REQUESTS = [RolloutRequest(sample_id, sample_id // 2, sample_id, sample_id % 2 == 1) for sample_id in range(10)]


def info(*ids: int, interrupted: bool = False) -> TrajectoryInfo:
    count = len(ids)
    return TrajectoryInfo(
        sample_id=np.array(ids), prompt_row=np.array(ids) // 2, greedy=np.array(ids) % 2 == 1,
        finished=np.full(count, not interrupted), interrupted=np.full(count, interrupted),
        prompt_tokens=np.ones(count, np.int32), response_tokens=np.ones(count, np.int32),
        weight_version=np.zeros(count, np.int32),
    )  # fmt: skip


def scored(count: int, lost: bool = False) -> ScoredShard:
    return ScoredShard(np.zeros(count, np.float32), {}, {}, drop=False, lost=lost)


def test_enough_is_a_share_of_the_prompts_and_those_that_may_not_be_left_again():
    arrived = _Arrived(REQUESTS, 2, wait_for=0.6, leave=1)  # 5 prompts, of which the first was left before
    arrived.add("a", info(2, 3, 4))
    arrived.add("b", info(5, 6, 7, 8))
    assert arrived.undone == 2, "the first, and the last, of which one sample came"
    assert not arrived.enough(), "3 of 5 are done, but the first is not among them"
    arrived.add("c", info(0, 1))
    assert arrived.enough()
    assert not _Arrived(REQUESTS, 2).enough()


def test_what_was_interrupted_is_asked_for_from_where_it_is():
    arrived = _Arrived(REQUESTS, 2, wait_for=0.6, leave=0)
    assert arrived.add("a", info(0, 1, 2))
    assert not arrived.add("b", info(9, 3, interrupted=True))
    assert arrived.left() == {1: {0: Begun("a", 2), 1: Begun("b", 1)}, 4: {1: Begun("b", 0)}}
    assert [(request.sample_id, request.begun) for request in arrived.take_begun()] == [
        (3, Begun("b", 1)), (9, Begun("b", 0)),
    ]  # fmt: skip
    assert arrived.left() == {}


def test_a_shard_that_was_lost_is_owed_again():
    arrived = _Arrived(REQUESTS[:6], 2, wait_for=1.0, leave=0)
    for shard, part in (("a", info(0, 1)), ("b", info(4, 2)), ("c", info(3, 5))):
        arrived.add(shard, part)
    assert arrived.enough()
    again = arrived.score([scored(2), scored(2, lost=True), scored(2)])
    assert [request.sample_id for request in again] == [2, 4]
    assert not arrived.enough()
    assert (arrived.shards, arrived.undone) == (["a", "c"], 2)
    arrived.add("d", info(2, 4))
    assert arrived.score([scored(2)]) == []
    assert (arrived.shards, arrived.undone, len(arrived.scored)) == (["a", "c", "d"], 0, 3)


def test_a_sample_without_a_greedy_one_to_compare_it_with_is_not_learned_from():
    part = info(0, 1, 2, 3, 4, 5)
    rewards = np.array([1, 2, np.nan, 4, 5, np.nan], np.float32)
    prompt = part.sample_id // 2
    assert with_reward(part, prompt, rewards, greedy_rollouts=True).tolist() == [True, True] + [False] * 4
    assert with_reward(part, prompt, rewards, greedy_rollouts=False).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("error", [GetTimeoutError("late"), ObjectLostError("00", None, ""), RayActorError()])
def test_a_begun_sample_that_cannot_be_fetched_is_sampled_from_its_start(monkeypatch, error: Exception):
    waited: list[float] = []

    def get(ref: object, timeout: float) -> None:
        waited.append(timeout)
        raise error

    monkeypatch.setattr(actor.ray, "get", get)
    engine = object.__new__(RolloutActor)
    vars(engine).update(rollout=SimpleNamespace(timeout_s=60.0))
    sample = engine._begin(RolloutRequest(3, 1, 3, True, Begun("shard", 0)))
    assert (sample.tokens, sample.finished, sample.interrupted) == ([], False, True)
    assert waited == [15.0], "three quarters of the time are left for sampling"
