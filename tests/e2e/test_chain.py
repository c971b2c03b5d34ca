"""The whole chain as a user types it, on the tiny world, in a few small steps."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from fake_judge import fake_judge
from safetensors.torch import load_file

from c2f_ray import load_recipe
from c2f_ray.cli import app, main
from c2f_ray.data.trajectory import Ragged
from c2f_ray.errors import RecipeError
from c2f_ray.evaluation.check import check_evaluate
from c2f_ray.recipe.location import TINY_DATA
from c2f_ray.watch.metrics import read_metrics, without_timing
from tests.documented import ROOT, documented

SMALL = [
    "run.steps=3", "run.deterministic=true", "rollout.actors=2", "prompts.per_step=12", "rollout.shard_samples=8",
    "length.max_tokens=24", "merge.ratios=[0, 0.5]", "evaluate.num_prompts=12", "evaluate.max_tokens=32",
]  # fmt: skip
ONE_ENGINE = "rollout.actors=1"
FEW = "evaluate.models=[instruct, coarse, residue-*]"
STEPS, PROMPTS = 3, 12
JUDGED = [
    "evaluate.win_rate={prompts: 'tiny:prompts/train.jsonl', num_prompts: 4, template: configs/judge/pair.jinja}",
    "evaluate.mt_bench={questions: questions.jsonl, template: configs/judge/score.jinja, runs: 2}",
]
QUESTIONS = """{"question_id": 1, "category": "maths", "turns": ["b=3,b?", "c=b,b=4,c?"], "reference": ["so 3", "so 4"]}
{"question_id": 2, "category": "writing", "turns": ["a=1,d=a,d?", "e=2,e?"]}
"""


def c2f_ray(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "c2f_ray", *arguments]
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(checkout: Callable[[str], Path]) -> Path:
    folder = checkout("work")
    (folder / "questions.jsonl").write_text(QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The folder of a run that was trained, merged, evaluated and reported by the four commands."""
    # A judge who prefers the first answer, and finds every single one worth a 7.
    with fake_judge(lambda text: "[[A]]" if "[[C]]" in text else "[[7]]") as server:
        judge = f"evaluate.judge={{kind: endpoint, url: '{server.url}', model: fake}}"
        judged = [judge, *JUDGED, ONE_ENGINE]
        for command, more, said in (
            (documented("c2f-ray train configs/tiny.yaml"), [], "coarse actor: runs/tiny/coarse"),
            (documented("c2f-ray merge configs/tiny.yaml"), [], "fine actor: runs/tiny/fine/residue-0.5"),
            (documented("c2f-ray evaluate configs/tiny.yaml"), judged, "interpolate-0.5"),
        ):
            done = c2f_ray(folder, *command, *SMALL, *more)
            assert done.returncode == 0, done.stderr[-3000:]
            assert said in done.stdout
    # Of 7 models: 6 times 4 pairs in both orders, and 7 times 2 runs of 2 questions with 2 turns.
    assert len(server.requests) == 6 * 4 * 2 + 7 * 2 * 2 * 2
    done = c2f_ray(folder, *documented("c2f-ray report runs/tiny"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "tiny"


def tensors(folder: Path) -> dict[str, list[Any]]:
    """A model's weights as float32 values by name, whatever dtype they are stored in."""
    return {name: tensor.float().tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def metrics_of(run: Path) -> list[dict[str, float | None]]:
    return [without_timing(line) for line in read_metrics(run / "metrics.jsonl")]


def test_every_sample_is_trained_on_once_and_can_be_read(run: Path):
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["weights/version"] for line in metrics] == [1, 2, 3]
    seen: list[str] = []
    for step in range(1, STEPS + 1):
        rows = pq.read_table(run / "trajectories" / f"step_{step:06d}.parquet").to_pylist()
        assert [row["sample_id"] for row in rows] == list(range(2 * PROMPTS))
        assert [row["greedy"] for row in rows] == [False, True] * PROMPTS
        assert {row["weight_version"] for row in rows} == {step - 1}
        sampled = [row for row in rows if not row["greedy"]]
        assert sum(row["response_tokens"] for row in sampled) == metrics[step - 1]["learner/tokens"]
        assert sum(row["reward"] for row in sampled) / PROMPTS == pytest.approx(metrics[step - 1]["reward/mean"])
        assert all(row["response_tokens"] <= metrics[step - 1]["length/limit"] for row in rows)
        assert all(row["prompt"].startswith("Q:") and row["prompt"].endswith("?\nA:") for row in rows)
        seen += [row["prompt_id"] for row in sampled]
    assert len(set(seen)) == STEPS * PROMPTS, "no prompt comes twice in an epoch"


def test_the_first_step_has_no_kl_and_the_limit_starts_where_the_recipe_says(run: Path):
    first, *_, last = metrics_of(run)
    assert first["kl/sequence"] == pytest.approx(0, abs=1e-6)
    assert last["kl/sequence"] != 0
    assert (first["length/limit"], first["cm/p"], first["cm/limit"]) == (16, 0.5, 18.5)


def test_the_table_and_the_report_name_every_model(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    limit = int(metrics_of(run)[-1]["length/limit"])
    names = ["base", "instruct", "coarse", f"coarse@{limit}"]
    names += [f"{method}-{ratio}" for method in ("interpolate", "residue") for ratio in ("0", "0.5")]
    assert [model["name"] for model in evaluation["models"]] == names
    by_name = {model["name"]: model["metrics"] for model in evaluation["models"]}
    instruct = by_name["instruct"] | {"win_rate": 0.5}  # the others are compared with it
    assert by_name["residue-0"] == by_name["interpolate-0"] == instruct, "ratio 0 is the instruct model"
    assert by_name["residue-0"]["kl_to_instruct"] == 0.0 < by_name["coarse"]["kl_to_instruct"]
    assert by_name["coarse"]["perplexity"] != by_name["base"]["perplexity"] > 1
    assert by_name[f"coarse@{limit}"]["length"] <= limit < by_name["coarse"]["length"]
    fine = sorted(path.name for path in (run / "fine").iterdir() if not path.is_symlink())
    assert list(evaluation["verdicts"]) == fine == names[4:]
    if best := evaluation["best"]:  # these models know nothing, so the rule may allow none
        assert (run / "fine" / "best").readlink() == Path(best)
        assert evaluation["verdicts"][best].startswith("chosen: reward")
    report = (run / "report.html").read_text()
    assert all(name in report for name in names)
    assert "http://" not in report.replace("http://www.w3.org/", "")


def test_the_judge_reads_what_each_model_answered(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    pairs, scores = evaluation["win_rates"]["models"], evaluation["mt_bench"]["models"]
    names = [model["name"] for model in evaluation["models"] if "@" not in model["name"]]
    assert list(pairs) == [name for name in names if name != "instruct"]
    assert {(row["win_rate"], row["low"], row["high"], row["ties"]) for row in pairs.values()} == {(0.5, 0.5, 0.5, 4)}
    assert list(scores) == names
    assert {(row["mean"], row["spread"], row["left_out"]) for row in scores.values()} == {(7.0, 0.0, 0)}
    answers = {}
    for name in names:
        (path,) = (run / "evaluation" / "mt_bench").glob(f"{name}.{'?' * 16}.parquet")
        answers[name] = pq.read_table(path).to_pylist()
    assert [row["sample_id"] for row in answers["base"]] == [0, 1, 2, 3]
    assert answers["instruct"] == answers["residue-0"] != answers["coarse"], "sampled with the same seeds"
    texts = {name: [row[f"turn_{turn}"] for row in rows for turn in (1, 2)] for name, rows in answers.items()}
    assert len(set(texts["coarse"])) == 8, "runs and turns differ"
    assert "7.00" in (run / "report.html").read_text()


def test_watch_shows_the_end_of_the_run(run: Path, folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(folder)
    for command in (documented("c2f-ray watch runs/tiny"), documented("c2f-ray watch runs/tiny --once")):
        app(command, standalone_mode=False)
        shown = capsys.readouterr().out
        assert "step 3/3" in shown
        assert "ended" in shown


@pytest.fixture
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process refuses to unpickle ragged batches."""

    def refuse(self: Ragged, state: object) -> None:
        raise AssertionError("the driver unpickled token ids")

    monkeypatch.setattr(Ragged, "__setstate__", refuse, raising=False)


def test_the_demo_gives_the_same_bytes_and_no_token_reaches_the_driver(
    run: Path, folder: Path, cluster: None, no_tokens: None, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """The same again, all of it by one command."""
    monkeypatch.chdir(folder)
    assert documented("make demo") == ["demo"]
    app(["demo", "run.name=again", *SMALL, FEW], standalone_mode=False)
    again = Path("runs/again")
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith(("shown: ", "not shown: "))]) == 4
    assert "report: runs/again/report.html" in said
    assert metrics_of(again) == metrics_of(run)
    weights = [(path / "coarse" / "model.safetensors").read_bytes() for path in (run, again)]
    assert weights[0] == weights[1]
    assert tensors(again / "coarse") != tensors(TINY_DATA / "base")
    with pytest.raises(Exception, match="the driver unpickled token ids"):
        ray.get(ray.put(Ragged.from_rows([[1]], int)))  # the guard works
    command = documented('c2f-ray merge configs/tiny.yaml "merge.methods=[ties, dare]" merge.scale=0.8')
    app([*command, *SMALL, "run.name=again"], standalone_mode=False)
    fine = {path.name for path in (again / "fine").iterdir() if not path.is_symlink()}
    assert fine == {f"{method}-{ratio}" for method in ("interpolate", "residue", "ties", "dare") for ratio in (0, 0.5)}


def test_the_example_goes_on_where_the_run_is(
    run: Path, folder: Path, cluster: None, no_tokens: None, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """All is trained and merged already, and stays; the evaluation is done again."""
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    evaluated = (run / "evaluation.json").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["train_merge_evaluate.py", "configs/tiny.yaml", *SMALL, ONE_ENGINE, FEW])
    runpy.run_path(str(ROOT / "examples" / "train_merge_evaluate.py"))
    assert "runs/tiny: the best is " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert (run / "evaluation.json").stat().st_mtime_ns > evaluated


def test_ppo_trains_policy_and_critic_without_greedy_rollouts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The first of two steps warms the critic up and leaves the policy alone."""
    monkeypatch.chdir(folder)
    small = [*SMALL[:5], ONE_ENGINE, "run.steps=2", "learner.critic.warmup_steps=1", "learner.minibatches=3"]
    app([*documented("c2f-ray train configs/tiny_ppo.yaml"), *small], standalone_mode=False)
    first, second = metrics_of(Path("runs/tiny_ppo"))
    for step, line in enumerate((first, second)):
        rows = pq.read_table(f"runs/tiny_ppo/trajectories/step_{step + 1:06d}.parquet").to_pylist()
        assert [row["sample_id"] for row in rows] == list(range(PROMPTS))
        assert not any(row["greedy"] for row in rows)
        assert {row["weight_version"] for row in rows} == {step}
        assert sum(row["response_tokens"] for row in rows) == line["learner/tokens"]
        assert line["cm/critic"] == line["critic/loss"]
        assert "reward/greedy_mean" not in line
    assert "learner/loss" not in first
    assert first["critic/value_mean"] == 0.0 != second["critic/value_mean"]
    assert second["kl/sequence"] == 0.0, "the policy's first update is still to come"
    assert second["learner/approx_kl"] > 0
    assert tensors(Path("runs/tiny_ppo/coarse")) != tensors(TINY_DATA / "base")


PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

texts = {}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1]:]
    engine = LLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=128)
    (served,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=24))
    texts[folder] = [tokenizer.decode(out, skip_special_tokens=True), served.outputs[0].text]
    del engine
print("RESULT" + json.dumps(texts))
"""


def test_coarse_and_fine_load_in_plain_transformers_and_plain_vllm(run: Path):
    """With no code of ours: the same greedy text from both."""
    folders = [str(run / "coarse"), str(run / "fine" / "residue-0.5")]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, "Q:b=c,a=2,f=e,e=a,c=3,d=f,b?\nA:", *folders],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_PLUGINS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    texts = json.loads(done.stdout.split("RESULT")[1])
    for transformers_text, vllm_text in texts.values():
        assert transformers_text == vllm_text != ""


@pytest.mark.parametrize(
    ("command", "override", "problem"),
    [
        ("train", "learner.optimizer.lrr=1", "learner.optimizer.lrr: unknown key; did you mean learner.optimizer.lr?"),
        ("train", "policy.model=nowhere", "policy.model: nowhere: no such folder"),
        ("merge", "merge.ratios=[2]", "merge.ratios.0: 2: input should be less than or equal to 1"),
        ("merge", "run.seed=1", "no coarse actor there; run `c2f-ray train` with this recipe first"),
        ("evaluate", "reward.model=nowhere", "reward.model: nowhere: no such folder"),
        ("evaluate", "run.seed=1", "no coarse actor there; run `c2f-ray train` with this recipe first"),
    ],
)
def test_bad_input_ends_with_code_2_and_nothing_written(
    folder: Path, command: str, override: str, problem: str, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["c2f-ray", command, "configs/tiny.yaml", "run.name=bad", override])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert problem in said.err
    assert said.err.count("error: ") == 1
    assert not (folder / "runs" / "bad").exists()


def test_a_machine_that_is_too_small_is_found_before_any_actor_starts(folder: Path):
    gpus = ["rollout.gpus_per_actor=8", "rollout.memory=0.5", "learner.gpus_per_rank=1"]
    done = c2f_ray(folder, "train", "configs/tiny.yaml", "run.name=bad", *gpus)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the recipe asks for 10 GPU, and this machine has 0; lower rollout.actors" in line
    assert not (folder / "runs" / "bad").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluate.prompts=nothing.jsonl", "evaluate.prompts: nothing.jsonl: no such file"),
        ("evaluate.choose.by=rewrd", "evaluate.choose.by: rewrd: this evaluation has no such metric; it has reward, "),
        ("evaluate.accuracy=os:nothing", "evaluate.accuracy: os:nothing: module 'os' has no attribute 'nothing'"),
        ("evaluate.accuracy=os.path:join", "evaluate.accuracy: os.path:join fails on an empty response: TypeError"),
        ("evaluate.win_rate.against=coarser", "evaluate.win_rate.against: coarser: no such model; there are base, "),
        ("evaluate.win_rate.against=record.depth", "record.depth: 4 of 4 prompts have no text in 'depth'"),
        ("evaluate.models=[fine]", "evaluate.models: ['fine']: none of base, instruct, coarse, interpolate-0, "),
        ("evaluate.models=[residue-*]", "evaluate.kl_to_instruct: there is no instruct model"),
        ("evaluate.judge.api_key_env=NO_KEY", "evaluate.judge.api_key_env: NO_KEY: the environment has no such"),
        ("evaluate.win_rate.template=judge.txt", "evaluate.win_rate.template: judge.txt: no such file"),
        ("evaluate.mt_bench.questions=configs/tiny.yaml", "neither a .jsonl or .parquet file nor a dataset"),
        ("evaluate.max_tokens=100", "100 together, 2 times, are 296 tokens, beyond the model's context of 256"),
        ("evaluate.perplexity.field=txt", "texts.jsonl:1: no field 'txt'; it has text"),
        ("evaluate.max_tokens=250", "prompts.max_tokens 48 and evaluate.max_tokens 250 together, 2 times, are 596"),
        ("prompts.max_tokens=5", "tokens, more than prompts.max_tokens 5; raise the limit"),
    ],
)
def test_what_evaluate_refuses(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, problem: str):
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError) as error:
        judge = "evaluate.judge={kind: endpoint, url: 'http://127.0.0.1:9', model: fake}"
        check_evaluate(load_recipe("configs/tiny.yaml", *SMALL, judge, *JUDGED, override))
    assert problem in str(error.value)
