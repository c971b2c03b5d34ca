"""The layout of an update over ranks and micro-batches, and the tensors of a micro-batch."""

import numpy as np
import pytest
import torch

from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.learner.batching import Samples, even_micro_batches, micro_batches, num_packs, plan, split_by_tokens


def rows(layout):
    return [[batch.tolist() for batch in rank] for rank in layout]


def random_lengths(seed, count):
    return np.minimum(4096, np.random.default_rng(seed).lognormal(6, 0.8, count)).astype(np.int64) + 1


def test_tokens_of_by_hand():
    """Sample ids 5, 7 and 9 have responses of 2, 3 and 1 tokens; the greedy one (id 6) is not among them."""
    info = TrajectoryInfo(
        sample_id=np.array([9, 6, 5, 7]),
        prompt_row=np.zeros(4, np.int64),
        greedy=np.array([False, True, False, False]),
        finished=np.ones(4, bool),
        interrupted=np.zeros(4, bool),
        prompt_tokens=np.ones(4, np.int32),
        response_tokens=np.array([1, 8, 2, 3], np.int32),
        weight_version=np.zeros(4, np.int32),
    )
    empty = Ragged.from_rows([[]] * 4, np.int32)
    samples = Samples([Trajectories(info, empty, empty, empty, empty)])
    assert samples.tokens_of(np.array([2, 0, 1])).tolist() == [5, 0, 1, 2, 3, 4]
    assert samples.tokens_of(np.array([], np.int64)).tolist() == []


def test_split_by_hand():
    # 7 to rank 0; 5 and 4 to rank 1 (9); 3 to rank 0 (10); 1 to rank 1 (10)
    parts = split_by_tokens(np.array([7, 5, 4, 3, 1]), 2)
    assert [part.tolist() for part in parts] == [[0, 3], [1, 2, 4]]


def test_micro_batches_by_hand():
    # longest first: 9 | 4 4 3 (4 x 3 = 12 tokens with padding) | 2; of the two 4s, the first row comes first
    batches = micro_batches(np.array([3, 9, 4, 4, 2]), 12)
    assert [batch.tolist() for batch in batches] == [[1], [2, 3, 0], [4]]


def test_a_row_beyond_the_budget_is_alone():
    assert [batch.tolist() for batch in micro_batches(np.array([2, 50, 2]), 10)] == [[1], [0, 2]]


def test_ranks_meet_equally_often():
    # One long row against two short ones: rank 0 has nothing to halve and gets an empty micro-batch.
    assert rows(plan(np.array([10, 5, 5]), 2, 5)) == [[[0], []], [[1], [2]]]
    # Rank 0 (7 3) fits one micro-batch of 14, rank 1 (5 4 1) needs two: rank 0's is cut.
    assert rows(plan(np.array([7, 5, 4, 3, 1]), 2, 14)) == [[[0], [3]], [[1], [2, 4]]]
    # Four 4s make two micro-batches of 8 tokens or four of 4, never three: one of the two is halved.
    assert rows([even_micro_batches(np.array([4, 4, 4, 4]), 16, 3)]) == [[[0], [1], [2, 3]]]
    assert rows(plan(np.array([5]), 3, 5)) == [[[0]], [[]], [[]]]


@pytest.mark.parametrize("seed", range(25))
def test_every_sample_exactly_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = random_lengths(seed, int(rng.integers(1, 400)))
    num_ranks, budget = int(rng.integers(1, 9)), int(rng.integers(64, 20000))
    layout = plan(lengths, num_ranks, budget)
    assert sorted(row for rank in layout for batch in rank for row in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in layout}) == 1
    assert len(layout) == num_ranks
    for batch in (batch for rank in layout for batch in rank if len(batch) > 1):
        assert lengths[batch].max() * len(batch) <= budget
    loads = [sum(lengths[batch].sum() for batch in rank) for rank in layout]
    assert max(loads) - min(loads) <= lengths.max()
    assert rows(layout) == rows(plan(lengths.copy(), num_ranks, budget))


def test_imbalance_and_padding_at_scale():
    lengths = random_lengths(0, 1024)
    layout = plan(lengths, 8, 16384)
    loads = np.array([sum(int(lengths[batch].sum()) for batch in rank) for rank in layout])
    padded = np.array([[int(lengths[batch].max()) * len(batch) for batch in rank] for rank in layout])
    assert loads.max() / loads.mean() < 1.001
    assert padded.sum() / lengths.sum() < 1.30
    # Ranks meet after every micro-batch: what the slowest compute in each round, against no waiting at all.
    assert padded.max(axis=0).sum() / padded.sum(axis=1).mean() < 1.06


def test_packs_by_hand():
    """At most 6 tokens in each: 4 and 2 beside 3 and 3 are two packs; of 5, 4 and 3 no two fit together."""
    assert num_packs(np.array([4, 3, 3, 2]), 6) == 2
    assert rows(plan(np.array([4, 3, 3, 2]), 1, 6, packing=True)) == [[[0, 3], [1, 2]]]
    assert num_packs(np.array([5, 4, 3]), 6) == 3
    assert num_packs(np.array([50, 2, 2]), 6) == 2  # a row beyond the budget is alone
    assert rows(plan(np.array([50, 2, 2]), 1, 6, packing=True)) == [[[0], [1, 2]]]
    assert rows(plan(np.array([5]), 2, 6, packing=True)) == [[[0]], [[]]]


@pytest.mark.parametrize("seed", range(25))
def test_packs_keep_to_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = random_lengths(seed, int(rng.integers(1, 400)))
    num_ranks, budget = int(rng.integers(1, 9)), int(rng.integers(64, 20000))
    layout = plan(lengths, num_ranks, budget, packing=True)
    assert sorted(row for rank in layout for pack in rank for row in pack) == list(range(len(lengths)))
    assert len({len(rank) for rank in layout}) == 1
    for pack in (pack for rank in layout for pack in rank if len(pack) > 1):
        assert lengths[pack].sum() <= budget


def test_packs_at_scale():
    """The fewest that hold so many tokens, and no rank waits for another in any of them."""
    lengths = random_lengths(0, 1024)
    tokens = np.array([[int(lengths[pack].sum()) for pack in rank] for rank in plan(lengths, 8, 16384, packing=True)])
    assert tokens.shape[1] == -(-lengths.sum() // 8 // 16384)
    assert tokens.max(axis=0).sum() / tokens.sum(axis=1).mean() < 1.01


def shard(ids, prompts, responses, greedy=None):
    greedy = greedy or [False] * len(ids)
    info = TrajectoryInfo(
        sample_id=np.array(ids),
        prompt_row=np.array(ids),
        greedy=np.array(greedy),
        finished=np.ones(len(ids), bool),
        interrupted=np.zeros(len(ids), bool),
        prompt_tokens=np.array([len(row) for row in prompts], np.int32),
        response_tokens=np.array([len(row) for row in responses], np.int32),
        weight_version=np.zeros(len(ids), np.int32),
    )
    logprobs = [[-float(token) for token in row] for row in responses]
    return Trajectories(
        info, Ragged.from_rows(prompts, np.int32), Ragged.from_rows(responses, np.int32),
        Ragged.from_rows(logprobs, np.float32), Ragged.from_rows([[0] * len(row) for row in responses], np.int32),
    )  # fmt: skip


def test_a_micro_batch_by_hand():
    shards = [
        shard([9, 4], [[5, 6], [5, 6]], [[7, 8, 9], [1, 1, 1, 1, 1]], greedy=[False, True]),
        shard([2, 7], [[4], [3, 3, 3]], [[3], [2, 2]]),
    ]
    samples = Samples(shards)
    assert samples.sample_id.tolist() == [2, 7, 9]  # 4 is the greedy rollout
    assert samples.lengths.tolist() == [2, 5, 5]
    micro = samples.micro_batch(np.array([2, 0]))
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert micro.predicts.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert micro.targets.tolist() == [7, 8, 9, 3]
    assert micro.mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert micro.sampler_logprobs.tolist() == [-7, -8, -9, -3]
    assert micro.unflatten(micro.sampler_logprobs).tolist() == [[-7, -8, -9], [-3, 0, 0]]


def test_a_packed_micro_batch_by_hand():
    shards = [shard([9], [[5, 6]], [[7, 8, 9]]), shard([2], [[4]], [[3]])]
    micro = Samples(shards, packing=True).micro_batch(np.array([1, 0]))
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert micro.predicts.int().tolist() == [[0, 1, 1, 1, 0, 1, 0]]
    assert micro.packing["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert micro.packing["cu_seq_lens_q"].tolist() == [0, 5, 7]
    assert micro.packing["max_length_q"] == 5
    assert micro.targets.tolist() == [7, 8, 9, 3]
    assert micro.unflatten(micro.sampler_logprobs).tolist() == [[-7, -8, -9], [-3, 0, 0]]


@pytest.mark.parametrize("packing", [False, True])
def test_an_empty_micro_batch_is_one_row_of_padding(packing):
    micro = Samples([shard([0], [[4]], [[3]])], packing=packing).micro_batch(np.array([], dtype=np.int64))
    assert micro.input_ids.tolist() == [[0]]
    assert micro.packing.get("cu_seq_lens_q", torch.tensor([0, 1])).tolist() == [0, 1]
    assert micro.predicts.tolist() == [[False]]
    assert micro.targets.tolist() == []
    assert micro.unflatten(micro.sampler_logprobs).tolist() == []


def test_arrival_order_leaves_no_trace():
    first = shard([3, 0], [[1], [2, 2]], [[3], [4, 4]])
    second = shard([2, 1], [[5], [6]], [[7, 7, 7], [8]])
    one, other = Samples([first, second]), Samples([second, first])
    everything = np.arange(4)
    assert one.micro_batch(everything).input_ids.tolist() == [[2, 2, 4, 4], [6, 8, 0, 0], [5, 7, 7, 7], [1, 3, 0, 0]]
    assert other.micro_batch(everything).input_ids.tolist() == one.micro_batch(everything).input_ids.tolist()
    assert other.lengths.tolist() == one.lengths.tolist()
