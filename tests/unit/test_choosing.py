"""The rule picks the best fine actor, and gives every other one the reason that it lost for."""

import pytest

from c2f_ray.evaluation.choosing import choose
from c2f_ray.evaluation.job import link_best
from c2f_ray.recipe import Choose

INSTRUCT = {"reward": -1.0, "repeated_lines": 0.01, "accuracy": 0.5, "distinct_4": None}
RULE = Choose(at_most_over_instruct={"repeated_lines": 0.02}, at_least_over_instruct={"accuracy": 0.0})


def model(reward: float | None, repeated_lines: float | None, accuracy: float) -> dict[str, float | None]:
    return {"reward": reward, "repeated_lines": repeated_lines, "accuracy": accuracy, "distinct_4": 1.0}


def test_most_reward_among_those_that_repeat_no_more_and_know_no_less():
    models = {
        "instruct": INSTRUCT,
        "a-0.2": model(0.5, 0.03, 0.5),  # on both bounds, which is allowed
        "a-0.4": model(0.75, 0.03, 0.9),
        "a-0.6": model(0.75, 0.0, 1.0),
        "a-0.8": model(2.0, 0.04, 0.4),
        "b-0.2": model(1.0, 0.0, 0.25),
        "b-0.4": model(None, 0.0, 1.0),
        "b-0.6": model(3.0, None, 1.0),
    }
    choice = choose(RULE, models, [name for name in models if name != "instruct"])
    assert choice.best == "a-0.4"
    assert choice.verdicts == {
        "a-0.2": "lost: reward 0.5 is less than a-0.4's 0.75",
        "a-0.4": "chosen: reward 0.75, the most of the 3 that the rule allows",
        "a-0.6": "lost: reward 0.75 is no more than a-0.4's 0.75",
        "a-0.8": "lost: repeated_lines 0.04 is more than the instruct model's 0.01 +0.02; "
        "accuracy 0.4 is less than the instruct model's 0.5 +0",
        "b-0.2": "lost: accuracy 0.25 is less than the instruct model's 0.5 +0",
        "b-0.4": "lost: it has no reward",
        "b-0.6": "lost: repeated_lines cannot be compared: it has none",
    }


def test_a_margin_below_zero_allows_a_loss():
    models = {"instruct": INSTRUCT, "a": model(1.0, 0.0, 0.4)}
    assert choose(Choose(at_least_over_instruct={"accuracy": -0.2}), models, ["a"]).best == "a"
    assert choose(Choose(at_least_over_instruct={"accuracy": -0.05}), models, ["a"]).best is None


def test_none_is_chosen_where_the_instruct_model_has_nothing_to_compare_with():
    choice = choose(
        Choose(at_least_over_instruct={"distinct_4": 0.0}), {"instruct": INSTRUCT, "a": model(1, 0, 1)}, ["a"]
    )
    assert (choice.best, choice.verdicts["a"]) == (
        None,
        "lost: distinct_4 cannot be compared: the instruct model has none",
    )


def test_what_has_less_of_a_good_thing_is_refused():
    with pytest.raises(ValueError, match="by 'repeated_lines': less of it is better"):
        Choose(by="repeated_lines")


def test_the_link_is_relative_and_follows_the_choice(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "fine" / name).mkdir(parents=True)
    link_best(tmp_path / "fine", "a")
    link_best(tmp_path / "fine", "b")
    (tmp_path / "fine").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "best").resolve() == tmp_path / "moved" / "b"
    link_best(tmp_path / "moved", None)
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["a", "b"]
