"""Which rows are scored together, and what is told of a score that is none."""

import threading
import time

import numpy as np
import pytest

from c2f_ray.reward.batching import Batcher, around_first
from c2f_ray.reward.samples import Encoded, score_each


def row(tokens: int) -> Encoded:
    return Encoded([7] * tokens, 0)


def test_a_batch_is_the_oldest_row_and_those_nearest_in_length():
    lengths = [50, 10, 48, 52, 100, 51, 200]
    assert around_first(lengths, 50) == [0], "52 x 2 would be too many"
    assert around_first(lengths, 104) == [0, 5], "51 is as near as any"
    assert around_first(lengths, 51 * 3) == [0, 2, 5], "52 x 3 is too many, and 48 costs no padding beyond 51"
    assert around_first(lengths, 52 * 4) == [0, 2, 3, 5]
    assert around_first(lengths, 7 * 200) == list(range(7))
    assert around_first([900], 10) == [0], "a row beyond the budget is a batch of its own"


def test_padding_is_a_tenth_of_what_arrival_order_has():
    rng = np.random.default_rng(1)
    waiting = np.clip(rng.lognormal(5.0, 1.0, 400), 16, 2048).astype(int).tolist()
    real, padded = sum(waiting), 0
    fixed = sum(max(waiting[i : i + 16]) * len(waiting[i : i + 16]) for i in range(0, 400, 16))
    while waiting:
        batch = around_first(waiting, 8192)
        assert 0 in batch
        padded += max(waiting[i] for i in batch) * len(batch)
        waiting = [length for i, length in enumerate(waiting) if i not in batch]
    assert padded - real < 0.1 * (fixed - real)


def test_calls_share_batches_and_wait_no_longer_than_told():
    sizes: list[int] = []

    def forward(rows: list[Encoded]) -> list[float]:
        sizes.append(len(rows))
        return [float(len(encoded.ids)) for encoded in rows]

    batcher = Batcher(forward, max_tokens=40, max_wait_s=2.0, across_calls=True)
    found: dict[int, list[float | str]] = {}
    calls = [
        threading.Thread(target=lambda n=n: found.update({n: batcher.score([row(10), row(8 + n)])})) for n in (1, 2)
    ]
    for call in calls:
        call.start()
    time.sleep(0.1)
    assert not sizes, "39 tokens are no full batch"
    last = threading.Thread(target=lambda: found.update({3: batcher.score([row(3)])}))
    last.start()
    for call in [*calls, last]:
        call.join(timeout=600)
    assert found == {1: [10.0, 9.0], 2: [10.0, 10.0], 3: [3.0]}
    assert sizes == [4, 1], "the rows that fit, of both calls, and then the rest"
    quick = Batcher(forward, max_tokens=10**6, max_wait_s=0.05, across_calls=True)
    assert quick.score([row(3)]) == [3.0], "a batch that never fills up is scored all the same"


def test_without_sharing_a_batch_has_rows_of_one_call():
    seen: list[list[int]] = []
    release = threading.Event()

    def forward(rows: list[Encoded]) -> list[float]:
        release.wait(10)
        seen.append([len(encoded.ids) for encoded in rows])
        return [0.0] * len(rows)

    batcher = Batcher(forward, max_tokens=10**6, max_wait_s=0.0, across_calls=False)
    calls = [threading.Thread(target=batcher.score, args=([row(n), row(n)],)) for n in (1, 2, 3)]
    for call in calls:
        call.start()
    release.set()
    for call in calls:
        call.join(timeout=600)
    assert sorted(seen) == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        ([1.0], "TypeError: returned 1 scores for 2 samples"),
        (None, "TypeError: returned None for 2 samples"),
        ("ab", "TypeError: returned 'ab' for 2 samples"),
    ],
)
def test_another_number_of_scores_is_asked_for_one_by_one(returned: object, cause: str):
    asked: list[int] = []

    def score(items: list[int]):
        asked.append(len(items))
        return returned if len(items) == 2 else [float(items[0])]

    assert score_each(score, [3, 4]) == [3.0, 4.0]
    assert asked == [2, 1, 1]
    alone = score_each(lambda items: returned if len(items) == 2 else None, [3, 4])
    assert alone == ["TypeError: returned None for 1 samples, and not a list of as many numbers"] * 2
    assert cause.startswith("TypeError")


def test_only_the_culprit_has_no_score():
    def score(items: list[int]):
        if 5 in items:
            raise KeyError("answer")
        return [float(item) for item in items]

    assert score_each(score, [4, 5, 6]) == [4.0, "KeyError: 'answer'", 6.0]
    found = score_each(lambda items: [1.0, float("nan"), "0.5", None, True, float("inf")], list(range(6)))
    assert [value for value in found if not isinstance(value, str)] == [1.0, 1.0]
    assert found[1:4] == [
        "the score is nan, not a finite number",
        "the score is '0.5', not a finite number",
        "the score is None, not a finite number",
    ]
