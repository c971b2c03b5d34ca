import pytest

from c2f_ray.evaluation.metrics import distinct_n, mean, repeated_line_share, response_metrics


def test_distinct_n_counts_overlapping_ngrams():
    # 4-grams of 1 2 3 4 1 2 3 4: 1234 2341 3412 4123 1234, so 4 of 5 are unique.
    assert distinct_n([1, 2, 3, 4, 1, 2, 3, 4]) == 4 / 5
    assert distinct_n([7] * 10) == 1 / 7
    assert distinct_n([1, 2, 3, 4]) == 1.0
    assert distinct_n([5, 5, 6, 5, 5], n=2) == 3 / 4  # 55 56 65 55


def test_a_response_shorter_than_n_has_no_distinct_n():
    assert distinct_n([1, 2, 3]) is None
    assert distinct_n([]) is None


def test_repeated_lines_are_the_second_and_later_occurrences():
    # Non-empty lines: a b a a, of which the last two occurred before; blank lines do not count.
    assert repeated_line_share("a\n\nb\n a \n\n\na\n") == 2 / 4
    assert repeated_line_share("only one") == 0
    assert repeated_line_share("\n \n") is None


def test_response_metrics_leave_undefined_shares_out_of_the_mean():
    metrics = response_metrics(
        responses=[[7] * 10, [1, 2, 3], [1, 2, 3, 4, 5]],
        texts=["x\nx\nx\ny", "", "p\nq"],
        finished=[False, True, True],
    )
    assert metrics["length"] == 18 / 3
    assert metrics["truncated"] == pytest.approx(1 / 3, abs=1e-15)
    assert metrics["distinct_4"] == pytest.approx((1 / 7 + 1) / 2, abs=1e-15)
    assert metrics["repeated_lines"] == (2 / 4 + 0) / 2


def test_a_mean_of_nothing_is_none():
    assert mean([None, None]) is None
