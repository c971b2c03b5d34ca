"""Updates that are not finite, in the middle of a run: skipped, saved aside, and in the end too many."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from c2f_ray.cli import app
from c2f_ray.driver import training as driver
from c2f_ray.errors import C2FError, NonFiniteUpdateError
from c2f_ray.learner.group import LearnerGroup
from c2f_ray.watch.metrics import read_metrics
from tests.documented import documented

COMMAND = documented("c2f-ray train configs/tiny.yaml run.trace=true run.name=traced")
SETTINGS = [
    "run.steps=9", "prompts.per_step=6", "rollout.samples_per_prompt=2", "length.max_tokens=24",
    "learner.max_bad_updates=2", "learner.ranks=1",
]  # fmt: skip
BAD = [2, 4, 5]


class FaultyLearnerGroup(LearnerGroup):
    """Real ranks, some of whose updates end as they do when a gradient is not finite."""

    updates = 0

    def finish_update(self, asked: Any) -> dict[str, float]:
        self.updates += 1
        if self.updates in BAD:
            raise NonFiniteUpdateError(
                f"the policy's gradient has no finite norm in the update on samples [{self.updates}]"
            )
        return super().finish_update(asked)


@pytest.fixture(scope="module")
def run(cluster: None, checkout: Callable[[str], Path]) -> Path:
    folder = checkout("bad_updates")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(driver, "LearnerGroup", FaultyLearnerGroup)
        with pytest.raises(C2FError) as error:
            app([*COMMAND, *SETTINGS], standalone_mode=False)
    assert "2 updates in a row were not finite, the last of them: the policy's gradient" in str(error.value)
    assert "samples [5]; their samples are in runs/traced/aside; lower learner.optimizer.lr" in str(error.value)
    return folder / "runs" / "traced"


def test_a_skipped_update_is_counted_and_saved_with_its_cause(run: Path):
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["learner/skipped"] for line in metrics] == [0, 1, 0, 1]
    assert ["learner/loss" in line for line in metrics] == [True, False, True, False]
    assert ["cm/limit" in line for line in metrics] == [True, False, True, False], "the controller saw no skipped step"
    assert metrics[1]["length/limit"] == metrics[2]["length/limit"]
    names = sorted(path.name for path in (run / "aside").iterdir())
    assert names == [f"step_00000{step}.{kind}" for step in BAD for kind in ("json", "parquet")]
    saved = json.loads((run / "aside" / "step_000004.json").read_text())
    assert saved == {"step": 4, "cause": "the policy's gradient has no finite norm in the update on samples [4]"}
    aside, every = (pq.read_table(run / where / "step_000004.parquet") for where in ("aside", "trajectories"))
    assert aside.equals(every)
    assert aside["step"].to_pylist() == [4] * 18


def test_remax_takes_several_samples_of_a_prompt_and_one_greedy_rollout(run: Path):
    rows = pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist()
    assert [row["greedy"] for row in rows] == [False, False, True] * 6
    assert all(len({row["prompt_id"] for row in rows[i : i + 3]}) == 1 for i in range(0, 18, 3))
    sampled, greedy = [row for row in rows if not row["greedy"]], [row for row in rows if row["greedy"]]
    first = read_metrics(run / "metrics.jsonl")[0]
    assert first["learner/tokens"] == sum(row["response_tokens"] for row in sampled)
    assert first["reward/greedy_mean"] == pytest.approx(sum(row["reward"] for row in greedy) / 6)
    # At first the policy is its reference, so the returns are the clipped differences of rewards.
    differences = [
        max(-1.5, min(1.5, rows[i]["reward"] - rows[i - i % 3 + 2]["reward"])) for i in range(18) if i % 3 < 2
    ]
    weighted = sum(d * row["response_tokens"] for d, row in zip(differences, sampled, strict=True))
    assert first["learner/return_mean"] == pytest.approx(weighted / first["learner/tokens"], abs=1e-5)
