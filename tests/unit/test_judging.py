"""Win rates and scores against hand-counted ones, and the judge's endpoint as a small HTTP server of our own."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_judge import FakeJudge, fake_judge
from jinja2 import Template

from c2f_ray.errors import JudgeError, RecipeError
from c2f_ray.evaluation.judge import Question, ask, check_judge, letter, load_template, score
from c2f_ray.evaluation.judging import mt_bench, win_rates
from c2f_ray.evaluation.mt_bench import TwoTurnSource, summary
from c2f_ray.evaluation.pairwise import judged_points, reward_points, win_rate
from c2f_ray.recipe import EndpointJudge, RewardJudge

JUDGES = Path(__file__).parents[2] / "configs" / "judge"


def endpoint(server: FakeJudge, **changes: Any) -> EndpointJudge:
    return EndpointJudge(kind="endpoint", url=server.url, model="fake", max_retries=0, **changes)


@pytest.mark.parametrize(
    ("text", "is_letter", "is_score"),
    [
        ("A is better, though B is longer. [[A]]", "A", None),
        ("[[B]]\nSo I say [[B]].", "B", None),
        ("They are equal: [[C]]", "C", None),
        ("[[A]] or [[B]]", None, None),
        ("[A] wins", None, None),
        ("Rating: [[7.5]]", None, 7.5),
        ("[[10]]", None, 10.0),
        ("[[11]]", None, None),
        ("[[0.5]]", None, None),
        ("[[3]] at first, [[8]] on reflection", None, None),
        ("", None, None),
    ],
)
def test_only_what_was_asked_for_is_a_verdict(text: str, is_letter: str | None, is_score: float | None):
    assert (letter(text), score(text)) == (is_letter, is_score)


def test_points_are_the_mean_of_both_orders():
    a, b, tie, rubbish = "[[A]]", "[[B]]", "[[C]]", "I cannot say"
    assert judged_points(a, b) == 1.0  # it wins in either place
    assert judged_points(b, a) == 0.0
    assert judged_points(a, a) == judged_points(tie, tie) == 0.5  # the judge prefers the first place
    assert judged_points(a, tie) == 0.75
    assert judged_points(a, rubbish) is None
    assert [reward_points(x, 1.0) for x in (2.0, 1.0, 0.5)] == [1.0, 0.5, 0.0]


def test_the_interval_is_that_of_the_bootstrap():
    points = [1.0] * 60 + [0.5] * 20 + [0.0] * 120 + [None] * 3
    found = win_rate(points, seed=1)
    assert (found["win_rate"], found["wins"], found["ties"], found["losses"], found["left_out"]) == (
        0.35,
        60,
        20,
        120,
        3,
    )
    # The normal approximation: variance (60 * 0.65^2 + 20 * 0.15^2 + 120 * 0.35^2) / 200 = 0.2025, so 0.35 -+ 0.0624.
    assert (found["low"], found["high"]) == pytest.approx((0.35 - 0.0624, 0.35 + 0.0624), abs=0.005)
    swapped = win_rate([None if value is None else 1 - value for value in points], seed=1)
    assert (swapped["low"], swapped["high"]) == pytest.approx((1 - found["high"], 1 - found["low"]), abs=1e-12)
    assert win_rate([None, None], seed=1) | {"left_out": 0} == {
        "win_rate": None, "low": None, "high": None, "wins": 0, "ties": 0, "losses": 0, "left_out": 0,
    }  # fmt: skip


# Answers to 60 prompts, saved as an evaluation saves them, and judges with habits.


@dataclass
class Plan:
    """What of an EvaluationPlan the judging reads."""

    judge: Any
    folder: Path
    num: int = 60
    against: str = "instruct"
    pair_template: Template = field(default_factory=lambda: Template((JUDGES / "pair.jinja").read_text()))
    score_template: Template = field(default_factory=lambda: Template((JUDGES / "score.jinja").read_text()))
    runs: int = 2

    @property
    def settings(self) -> Any:
        return SimpleNamespace(
            judge=self.judge,
            win_rate=SimpleNamespace(against=self.against),
            mt_bench=SimpleNamespace(runs=self.runs),
        )

    @property
    def rows(self) -> dict[str, range]:
        return {"win_rate": range(self.num), "mt_bench": range(self.num, self.num + 2)}

    @property
    def asked(self) -> Any:
        turns = [{"turns": ["one", "two"], "reference": None, "category": c} for c in ("maths", "writing")]
        return SimpleNamespace(
            ids=[str(i) for i in range(self.num + 2)],
            messages=[[{"role": "user", "content": f"question {i}"}] for i in range(self.num + 2)],
            records=[{"output": f"longer {i}"} for i in range(self.num)] + turns,
        )


def saved(folder: Path, **words: str) -> dict[str, Path]:
    paths = {}
    for number, (name, word) in enumerate(words.items()):
        rows = [{"response": f"{word} {i}", "reward": float((i + number) % 3)} for i in range(60)]
        paths[name] = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), paths[name])
    return paths


def answers_in(text: str) -> tuple[str, str]:
    first, second = (text.split(f"[answer of assistant {x}]\n")[1].split(f"\n[end of {x}]")[0] for x in "AB")
    return first, second


def longest(text: str) -> str:
    """Prefers the longer answer, and the first of equals."""
    first, second = answers_in(text)
    return "[[A]]" if len(first) >= len(second) else "[[B]]"


def test_a_model_against_itself_gets_a_half_from_a_judge_who_prefers_a_place(tmp_path: Path):
    with fake_judge(longest) as server:
        answers = saved(tmp_path, instruct="same", copy="same")
        found = win_rates(Plan(endpoint(server), tmp_path), answers, seed=1)["copy"]
    assert len(server.requests) == 120, "both orders of 60 pairs"
    assert (found["win_rate"], found["low"], found["high"], found["ties"]) == (0.5, 0.5, 0.5, 60)


def test_a_half_is_in_the_interval_of_a_judge_who_rolls_dice(monkeypatch: pytest.MonkeyPatch):
    """As often as a 95% interval promises."""
    monkeypatch.setattr("c2f_ray.evaluation.pairwise.RESAMPLES", 500)
    dice = random.Random(5)
    verdicts = ["[[A]]", "[[A]]", "[[B]]", "[[B]]", "[[C]]"]
    within = 0
    for seed in range(300):
        found = win_rate([judged_points(dice.choice(verdicts), dice.choice(verdicts)) for _ in range(60)], seed)
        within += found["low"] <= 0.5 <= found["high"]
        assert 0.05 < found["high"] - found["low"] < 0.25
    assert 0.9 <= within / 300 <= 0.98


def test_swapped_sides_mirror_the_result_and_no_verdict_is_asked_for_twice(tmp_path: Path):
    """By a judge with a preference for the first place and for some answers, who talks rubbish about some others."""

    def habit(text: str) -> str:
        first, _ = answers_in(text)
        number = int(first.split()[1])
        if number % 20 == 7 and first.startswith("long"):
            return "As a language model I have no opinion."
        return longest(text) if number % 3 else "[[A]]" if number % 2 else "[[C]]"

    answers = saved(tmp_path, instruct="short", fine="longer")
    with fake_judge(habit) as server:
        plan = Plan(endpoint(server), tmp_path)
        found = win_rates(plan, answers, seed=1)["fine"]
        plan.against = "fine"
        mirrored = win_rates(plan, answers, seed=1)["instruct"]
    # 40 prompts by length, which `fine` wins in both orders; 20 even ones. Rubbish on 7, 27 and 47 in one order.
    assert (found["wins"], found["ties"], found["losses"], found["left_out"]) == (38, 19, 0, 3)
    assert found["win_rate"] == pytest.approx((38 + 19 / 2) / 57)
    assert (mirrored["wins"], mirrored["ties"], mirrored["losses"], mirrored["left_out"]) == (0, 19, 38, 3)
    for key, other in (("win_rate", "win_rate"), ("low", "high"), ("high", "low")):
        assert mirrored[key] == pytest.approx(1 - found[other], abs=1e-12)
    assert found["characters"] == mirrored["characters_against"] == pytest.approx(found["characters_against"] + 1)
    assert len(server.requests) == 120, "the swapped pairs are the same questions"
    with fake_judge(habit) as server:
        plan = Plan(endpoint(server), tmp_path, against="record.output")
        beside = win_rates(plan, answers, seed=1)
    assert (beside["fine"]["wins"], beside["fine"]["losses"]) == (0, 0), "they are the same, and the first is preferred"
    assert (beside["instruct"]["wins"], beside["instruct"]["losses"]) == (0, 38)
    by_reward = Plan(RewardJudge(kind="reward"), tmp_path)
    found = win_rates(by_reward, answers, seed=1)["fine"]  # rewards 1, 2, 0 in turn against 0, 1, 2
    assert (found["wins"], found["ties"], found["losses"]) == (40, 0, 20)


def test_a_judge_that_fails_is_gone_on_with_and_never_shows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    questions = [Question(("test", str(i)), f"question {i}") for i in range(20)]
    path = tmp_path / "verdicts.jsonl"
    failing = True
    with fake_judge(lambda text: 401 if failing and text == "question 11" else f"[[{text[9:]}]]") as server:
        judge = endpoint(server, api_key_env="MY_KEY", requests_at_once=1, parameters={"temperature": 0.5, "top_k": 3})
        with pytest.raises(JudgeError) as error:
            ask(judge, questions, path)
        assert "AuthenticationError" in str(error.value)
        assert "no, not with Bearer ***" in str(error.value)
        assert server.keys == {"Bearer sk-very-secret"}
        with path.open("a") as file:
            file.write('{"key": "torn')  # as a killed process leaves it
        assert len(server.requests) == 12
        failing = False
        assert ask(judge, questions, path) == [f"[[{i}]]" for i in range(20)]
        assert len(server.requests) == 12 + 9
        assert server.requests[0] == {
            "model": "fake", "messages": [{"role": "user", "content": "question 0"}], "temperature": 0.5, "top_k": 3,
        }  # fmt: skip
        assert "secret" not in path.read_text()
        # Another judge, or other parameters, are other questions.
        ask(endpoint(server), questions[:1], path)
        assert len(server.requests) == 12 + 9 + 1
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(RecipeError, match="evaluate.judge.api_key_env: MY_KEY: the environment has no such variable"):
        check_judge(judge)


def test_scores_of_two_runs(tmp_path: Path):
    """[run][question][turn]; the judge gives 1 to 8 in this order, and rubbish for the last."""
    verdicts = iter(range(1, 9))

    def habit(text: str) -> str:
        number = next(verdicts)
        return "ten!" if number == 8 else f"[[{number}]]"

    rows = [{"sample_id": i, "turn_1": f"first {i}", "turn_2": f"second {i}"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "fine.parquet")
    with fake_judge(habit) as server:
        plan = Plan(endpoint(server, requests_at_once=1), tmp_path)
        found = mt_bench(plan, {"fine": tmp_path / "fine.parquet"})["fine"]
    assert found == {
        "mean": pytest.approx((2.5 + 6) / 2),
        "spread": pytest.approx(3.5 / 2**0.5),
        "runs": [2.5, 6.0],
        "turns": [4.0, pytest.approx(4.0)],
        "categories": {"maths": pytest.approx((1 + 2 + 5 + 6) / 4), "writing": pytest.approx((3 + 4 + 7) / 3)},
        "left_out": 1,
    }
    first, second = (request["messages"][0]["content"] for request in server.requests[:2])
    assert "first 0" in first
    assert "second 0" not in first
    assert "two" not in first
    assert all(word in second for word in ("one", "two", "first 0", "second 0"))
    assert summary([[[5.0, None]]], ["maths"])["spread"] is None


def test_templates_and_questions_are_checked_before_anything_is_asked(tmp_path: Path):
    path = tmp_path / "judge.jinja"
    example = {"answer_a": "<a>", "answer_b": "<b>"}
    for text, problem in (
        ("{{ answer_a }}", "of an example it leaves out '<b>'"),
        ("{{ answer_c }}", "'answer_c' is undefined; it is given answer_a, answer_b"),
        ("{% if %}", "Expected an expression"),
        ("{{ answer_a.__class__.__mro__ }}", "unsafe"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=f"evaluate.win_rate.template: .*{problem}"):
            load_template("evaluate.win_rate.template", str(path), example, ["<a>", "<b>"])
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 81, "category": "writing", "turns": ["a", "b"]}\n')
    ((name, messages, record),) = TwoTurnSource("key", str(questions)).load()
    assert (name, messages, record["turns"]) == ("81", [{"role": "user", "content": "a"}], ["a", "b"])
    questions.write_text('{"question_id": 81, "category": "writing", "turns": ["a"]}\n')
    with pytest.raises(RecipeError, match="questions.jsonl:1: no MT-Bench question"):
        TwoTurnSource("key", str(questions)).load()
