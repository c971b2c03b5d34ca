"""What the judge makes of the models' saved answers. It runs in the driver, which has the API key."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from c2f_ray.evaluation.check import EvaluationPlan
from c2f_ray.evaluation.judge import Question, ask, score
from c2f_ray.evaluation.mt_bench import TURNS, summary
from c2f_ray.evaluation.pairwise import judged_points, mean_characters, reward_points, win_rate
from c2f_ray.recipe import RECORD, EndpointJudge

Rows = list[dict[str, Any]]


def win_rates(plan: EvaluationPlan, answers: dict[str, Path], seed: int) -> dict[str, dict[str, Any]]:
    """Every model against `win_rate.against`, from each one's answers, a .parquet file."""
    settings = plan.settings.win_rate
    assert settings is not None
    rows = {name: pq.read_table(path).to_pylist() for name, path in answers.items()}
    if settings.against.startswith(RECORD):
        key = settings.against.removeprefix(RECORD)
        others = [{"response": plan.asked.records[row][key]} for row in plan.rows["win_rate"]]
    else:
        others = rows[settings.against]
    found: dict[str, dict[str, Any]] = {}
    for name, own in rows.items():
        if name == settings.against:
            continue
        if isinstance(plan.settings.judge, EndpointJudge):
            points = _judged(plan, (name, own), (settings.against, others))
        else:
            points = [reward_points(a["reward"], b["reward"]) for a, b in zip(own, others, strict=True)]
        found[name] = {
            **win_rate(points, seed),
            "characters": mean_characters([row["response"] for row in own]),
            "characters_against": mean_characters([row["response"] for row in others]),
        }
    return found


def _judged(plan: EvaluationPlan, own: tuple[str, Rows], other: tuple[str, Rows]) -> list[float | None]:
    """The points of `own`, a name and its rows, in each pair; both orders are asked for."""
    assert plan.pair_template is not None
    questions: list[Question] = []
    for (name_a, rows_a), (name_b, rows_b) in ((own, other), (other, own)):
        for row, a, b in zip(plan.rows["win_rate"], rows_a, rows_b, strict=True):
            text = plan.pair_template.render(
                messages=plan.asked.messages[row],
                record=plan.asked.records[row],
                answer_a=a["response"],
                answer_b=b["response"],
            )
            questions.append(Question(("win_rate", plan.asked.ids[row], name_a, name_b), text))
    verdicts = _ask(plan, questions)
    half = len(verdicts) // 2
    return [judged_points(first, second) for first, second in zip(verdicts[:half], verdicts[half:], strict=True)]


def mt_bench(plan: EvaluationPlan, answers: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Every model's scores, from its answers to all runs, a .parquet file."""
    settings, questions_at = plan.settings.mt_bench, plan.rows["mt_bench"]
    assert settings is not None and plan.score_template is not None
    records = [plan.asked.records[row] for row in questions_at]
    found: dict[str, dict[str, Any]] = {}
    for name, path in answers.items():
        questions: list[Question] = []
        for row in pq.read_table(path).to_pylist():
            run, number = divmod(row["sample_id"], len(records))
            record, its = records[number], [row[f"turn_{turn}"] for turn in range(1, TURNS + 1)]
            for turn in range(1, TURNS + 1):
                reference = record["reference"][:turn] if record["reference"] else None
                text = plan.score_template.render(
                    turns=record["turns"][:turn], answers=its[:turn], reference=reference, record=record
                )
                about = ("mt_bench", plan.asked.ids[questions_at[number]], name, str(run), str(turn))
                questions.append(Question(about, text))
        scores = iter([score(verdict) for verdict in _ask(plan, questions)])
        by_run = [[[next(scores) for _ in range(TURNS)] for _ in records] for _ in range(settings.runs)]
        found[name] = summary(by_run, [record["category"] for record in records])
    return found


def _ask(plan: EvaluationPlan, questions: list[Question]) -> list[str]:
    judge = plan.settings.judge
    assert isinstance(judge, EndpointJudge)
    return ask(judge, questions, plan.folder / "evaluation" / "verdicts.jsonl")
