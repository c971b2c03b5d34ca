"""How models are asked what they are judged by, and when an answer that is kept still counts."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from c2f_ray import load_recipe
from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Ragged, Trajectories, TrajectoryInfo
from c2f_ray.errors import DeadlineError
from c2f_ray.evaluation.answers import answers_path
from c2f_ray.evaluation.check import Candidate
from c2f_ray.evaluation.mt_bench import second_turn
from c2f_ray.runtime.waiting import in_turn
from c2f_ray.tiny.tokenizer import policy_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def prompt_set(tokens: list[list[int]], turns: list[list[str]]) -> PromptSet:
    messages = [[{"role": "user", "content": first}] for first, _ in turns]
    records: list[dict[str, Any]] = [{"turns": its} for its in turns]
    return PromptSet([str(i) for i in range(len(turns))], messages, records, Ragged.from_rows(tokens, np.int32), 0)


def test_the_second_turn_is_asked_after_the_first_ones_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of sample ids, whatever order the answers came in; too long a talk loses its beginning."""
    monkeypatch.setattr("c2f_ray.evaluation.mt_bench.wait_for", lambda refs, *_: refs)
    policy_tokenizer(with_template=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    prompts = prompt_set([[1], [2]], [["b=3,b?", "c=4,c?"], ["a=1,a?", "d=2,d?"]])
    answers = ["so 1", "so 3", "check", "so 7"]  # of samples 3, 0, 1 and 2, that is of questions 1, 0, 1 and 0
    info = TrajectoryInfo(
        np.array([3, 0, 1, 2]), np.array([1, 0, 1, 0]), *([np.zeros(4, bool)] * 3), *([np.ones(4, np.int32)] * 3)
    )
    tokens = [tokenizer(answer)["input_ids"] for answer in answers]
    empty = Ragged.from_rows([[]] * 4, np.int32)
    shard = Trajectories(info, empty, Ragged.from_rows(tokens, np.int32), empty, empty)
    template = tokenizer.chat_template
    rows = second_turn._function(str(tmp_path), template, prompts, [shard], 100, 1.0)
    texts = [decode(tokenizer, rows[i], special=True) for i in range(4)]
    end = tokenizer.eos_token
    assert texts == [
        f"Q:b=3,b?\nA:so 3{end}Q:c=4,c?\nA:",
        f"Q:a=1,a?\nA:check{end}Q:d=2,d?\nA:",
        f"Q:b=3,b?\nA:so 7{end}Q:c=4,c?\nA:",
        f"Q:a=1,a?\nA:so 1{end}Q:d=2,d?\nA:",
    ]
    short = second_turn._function(str(tmp_path), template, prompts, [shard], 5, 1.0)
    assert [short[i].tolist() for i in range(4)] == [rows[i].tolist()[-5:] for i in range(4)]


def test_an_answer_counts_until_what_it_depends_on_changes(tmp_path: Path):
    model = tmp_path / "fine"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    turns = [["one", "two"]]

    def path(part: str = "mt_bench", tokens: int = 1, name: str = "fine", **changes: Any) -> Path:
        settings = {"max_tokens": 32, "runs": 2} | changes
        asked = prompt_set([[tokens], [7]], [*turns, ["x", "y"]])
        plan: Any = SimpleNamespace(
            settings=SimpleNamespace(
                max_tokens=settings["max_tokens"], mt_bench=SimpleNamespace(runs=settings["runs"])
            ),
            rows={"mt_bench": range(1), "win_rate": range(1)},
            asked=asked,
            folder=tmp_path,
        )
        recipe = load_recipe(CONFIG, *settings.get("overrides", []))
        return answers_path(recipe, plan, part, Candidate(name, str(model), "", asked, fine=True))

    first = path()
    assert first.parent == tmp_path / "evaluation" / "mt_bench"
    assert path() == first
    changed = [
        path(tokens=2), path(max_tokens=64), path(runs=3), path(overrides=["rollout.temperature=0.5"]),
        path(overrides=["run.seed=2"]), path(name="other"), path("win_rate"),
    ]  # fmt: skip
    turns[0] = ["one", "three"]
    changed.append(path())
    turns[0] = ["one", "two"]
    os.utime(model / "model.safetensors", ns=(1, 1))
    changed.append(path())
    assert len({first, *changed}) == 10
    assert path("win_rate", runs=3) == path("win_rate"), "which has no runs"
    assert path("win_rate") != path("win_rate", overrides=["reward.max_tokens=99"])


def test_tasks_run_so_many_at_once_and_a_silent_one_is_named(monkeypatch: pytest.MonkeyPatch):
    running: list[str] = []
    most = 0

    def start(name: str) -> str:
        nonlocal most
        running.append(name)
        most = max(most, len(running))
        return name

    def wait(refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        done = [ref for ref in refs if ref != "slow"][-1:]
        running[:] = [name for name in running if name not in done]
        return done, []

    cancelled: list[str] = []
    fake_ray = SimpleNamespace(
        wait=wait, get=lambda ref, timeout: ref.upper(), cancel=lambda ref, force: cancelled.append(ref)
    )
    monkeypatch.setattr("c2f_ray.runtime.waiting.ray", fake_ray)
    starts = {name: (lambda name=name: start(name)) for name in ("a", "b", "c", "d")}
    assert dict(in_turn(starts, 2, 1.0, "the task of")) == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert most == 2
    with pytest.raises(DeadlineError, match="the task of slow: not finished after 1 s"):
        list(in_turn({"slow": lambda: start("slow"), **starts}, 2, 1.0, "the task of"))
    assert cancelled == ["slow"]
