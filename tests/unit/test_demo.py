"""The demo's verdicts follow from its numbers, and say so when the phenomenon is not there."""

import pytest

from c2f_ray.tiny.demo import findings


def steps(rewards: list[float], limits: list[int], lengths: list[float]) -> list[dict[str, float | None]]:
    return [
        {"step": i, "reward/mean": reward, "length/limit": limit, "length/mean": length}
        for i, (reward, limit, length) in enumerate(zip(rewards, limits, lengths, strict=True), start=1)
    ]


def evaluation(coarse: dict[str, float], fine: dict[str, float]) -> dict[str, object]:
    models = {
        "instruct": {"reward": -0.9, "strict": 0.5, "repeated_lines": 0.0, "truncated": 0.0},
        "coarse": coarse,
        "residue-0.6": fine,
    }
    return {"best": "residue-0.6", "models": [{"name": name, "metrics": m} for name, m in models.items()]}


COARSE = {"reward": 1.3, "strict": 0.0, "repeated_lines": 0.84, "truncated": 1.0}
FINE = {"reward": 0.7, "strict": 1.0, "repeated_lines": 0.01, "truncated": 0.0}


def test_the_phenomenon_is_told_in_the_runs_own_numbers():
    grown = steps([-0.4, 0.0, 0.1, 0.9, 1.0, 1.1], [16, 18, 20, 90, 96, 96], [15, 17, 19, 88, 92, 96])
    assert [str(finding) for finding in findings(grown, evaluation(COARSE, FINE))] == [
        "shown: reward of samples rises from -0.10 to 1.00",
        "shown: length limit grows from 18 to 94, mean length from 17 to 92 tokens",
        "shown: the coarse actor repeats 84% of its lines and overruns 100% of the time",
        "shown: residue-0.6 repeats 1%, with reward 0.70 against the instruct model's -0.90 and 100% right and ended "
        "against 50%",
    ]


def test_each_part_that_is_missing_is_said():
    flat = steps([0.5] * 6, [16] * 6, [10.0] * 6)
    tame = COARSE | {"repeated_lines": 0.1}
    worse = FINE | {"strict": 0.4}
    told = findings(flat, evaluation(tame, worse))
    assert [finding.shown for finding in told] == [False] * 4
    assert str(told[0]) == (
        "not shown: measured: reward of samples rises from 0.50 to 0.50; expected: a rise of more than 0.3"
    )
    assert told[3].margins == pytest.approx({"repeated_lines": 0.04, "reward": 1.6, "strict": -0.1})
    none = findings(flat, evaluation(tame, worse) | {"best": None})
    assert str(none[3]).startswith("not shown: measured: no fine actor that evaluate.choose allows; expected: ")
