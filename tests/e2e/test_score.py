"""`c2f-ray score`, as a user types it: responses, pairs, an interrupted job, a reward that fails for one of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.documented import documented

COMMAND = documented("c2f-ray score configs/tiny.yaml --in responses.jsonl --out scores.jsonl")
REWARDS = """
def score(samples):
    for sample in samples:
        if sample.response == "bad":
            raise ValueError("no number in it")
    return [float(len(sample.response)) for sample in samples]


def short(samples):
    return [float(not sample.finished) for sample in samples]
"""
REWARD = (
    "reward={kind: sum, parts: {length: {weight: 0.5, reward: {kind: function, function: 'my_rewards:score',"
    " attempts: 1, on_failure: FAILURE, truncation_penalty: 2}}, cut: {weight: -10, reward: {kind: function, function:"
    " 'my_rewards:short'}}}}"
)


def score(folder: Path, on_failure: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("c2f-ray"), *COMMAND, REWARD.replace("FAILURE", on_failure)],
        cwd=folder, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_responses_and_pairs_are_scored_and_a_half_written_file_is_gone_on_with(checkout: Callable[[str], Path]):
    folder = checkout("score")
    (folder / "my_rewards.py").write_text(REWARDS)
    message = [{"role": "user", "content": "a?"}]
    records = [
        *({"id": f"r{n}", "messages": message, "response": "x" * n, "finished": n % 2 == 0} for n in range(70)),
        {"id": "p1", "messages": message, "chosen": "xxx", "rejected": "x"},
        {"id": "p2", "messages": message, "chosen": "xx", "rejected": "yy"},
        {"id": "p3", "messages": message, "chosen": "x", "rejected": "bad"},
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stopped = score(folder, "stop")
    assert stopped.returncode == 1, stopped.stderr[-2000:]
    assert "'p3'" in stopped.stderr
    assert "ValueError: no number in it" in stopped.stderr
    begun = (folder / "scores.jsonl").read_text().splitlines()
    assert len(begun) == 64, "the two shards before the one that failed"

    (folder / "scores.jsonl").write_text("\n".join(begun[:40]) + "\n" + begun[40][:20])
    settings = json.loads((folder / "scores.jsonl.reward.json").read_text())
    settings["parts"]["length"]["reward"]["on_failure"] = "drop"
    refused = score(folder, "drop")
    assert refused.returncode == 2
    assert "error: --out: scores.jsonl: was written with another reward" in refused.stderr
    (folder / "scores.jsonl.reward.json").write_text(json.dumps(settings, indent=1))
    done = score(folder, "drop")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    for n, line in enumerate(lines[:70]):
        cut = n % 2
        assert line["reward"] == pytest.approx(0.5 * (n - 2 * cut) - 10 * cut)
        assert (line["reward_length"], line["reward_cut"]) == (n - 2 * cut, cut)
    assert lines[70]["chosen"]["reward"] == 1.5
    assert lines[72]["rejected"] == {
        "reward": None, "cause": "reward length: attempt 1: ValueError: no number in it"
    }  # fmt: skip
    assert "records 73, unscored 1, " in done.stdout
    assert "accuracy 0.75" in done.stdout, "one won, one tied, and one that could not be judged"
