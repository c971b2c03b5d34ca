"""README and docs: their commands are run, their links lead somewhere, and their metrics are those that are written."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import click
import pytest
import typer
import yaml

from c2f_ray.cli import app
from c2f_ray.driver.length import LengthDecision
from c2f_ray.plan.clusters import chosen_nodes
from c2f_ray.plan.estimate import estimate
from c2f_ray.recipe import MergeMethod, load_recipe
from tests.documented import LINES, ROOT, TEXTS, documented

COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands
SYNOPSIS = re.compile(r"RECIPE|RUN|PATH|\[key=value|\.\.\.")
NEEDS = re.compile(
    r"(a|\d+) GPUs? of \d+ GB|\d+ GB of (disk|memory)|on the cluster|in a cloud|AWS|Kube|half an hour on 2 cores"
    "|and runs all tests"
)
GPU_RECIPES = ("mistral_7b_remax", "mistral_c2f", "merlinite_7b_pt")


def test_every_command_is_run_by_a_test_or_says_what_hardware_it_needs():
    called = [
        node
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "documented"
    ]
    run = {argument.value for call in called for argument in call.args if isinstance(argument, ast.Constant)}
    shown = {line for _, line, needs in LINES if not SYNOPSIS.search(line) and not NEEDS.search(needs)}
    assert run <= shown
    assert shown - run == set()
    # e2e/test_chain.py runs what the Makefile does for `make demo`.
    assert "\ndemo: $(INSTALLED)\n\t@$(BIN)/c2f-ray demo $(ARGS)\n" in (ROOT / "Makefile").read_text()


def test_the_two_commands_before_all_others(tmp_path):
    """The first is make's environment; the second writes a token into a home of its own."""
    (tmp_path / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    (script,) = documented("source .venv/bin/activate")
    found = subprocess.run(
        ["bash", "-c", f"source {script} && command -v c2f-ray"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(Path(sys.prefix) / "bin" / "c2f-ray")
    ray = [Path(sys.prefix) / "bin" / "ray", *documented("ray get-auth-token --generate")]
    subprocess.run(ray, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=True)
    assert len((tmp_path / ".ray" / "auth_token").read_text().strip()) >= 32


def test_there_are_commands_on_every_page_that_is_about_running():
    pages = {page for page, _, _ in LINES}
    assert {"README.md", *(f"docs/{name}.md" for name in ("ppo", "remax", "length", "merging", "operating"))} <= pages
    assert set(COMMANDS) == {command.split()[1] for _, command, _ in LINES if command.startswith("c2f-ray ")}


@pytest.mark.parametrize(("page", "command", "comment"), [line for line in LINES if "c2f-ray " in line[1]])
def test_every_command_parses_and_its_recipe_is_valid(page: str, command: str, comment: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = command[command.index("c2f-ray ") + len("c2f-ray ") :]
    if synopsis := SYNOPSIS.search(command):
        command = re.sub(r"\[key=value \.\.\.\]|\[OTHER \.\.\.\]", "", command).replace("[", "").replace("]", "")
    name, *arguments = shlex.split(command)
    parsed = COMMANDS[name].make_context(name, arguments)  # refuses options that there are not
    if synopsis:
        return
    recipe = parsed.params.get("recipe")
    if recipe is not None and parsed.params.get("reward") is None:
        loaded = load_recipe(Path(recipe), *(parsed.params["overrides"] or []))
        if loaded.rollout.gpus_per_actor > 0 and name not in ("plan", "merge"):
            assert re.search(r"GPUs? of \d+ GB", comment), "say how many GPUs it needs"


@pytest.mark.parametrize("page", TEXTS)
def test_every_piece_of_a_recipe_is_valid(page: str, tmp_path):
    """In configs/tiny.yaml's place, and any file that it names is taken to be there."""
    for block in re.findall(r"^```yaml\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE):
        recipe = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
        for section, fields_ in yaml.safe_load(block).items():
            recipe[section] = recipe[section] | fields_
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        load_recipe(tmp_path / "recipe.yaml")


def test_the_script_of_the_readme_is_the_example():
    (script,) = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], flags=re.DOTALL | re.MULTILINE)
    assert (ROOT / "examples" / "train_merge_evaluate.py").read_text().endswith(script)


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_is_named_is_there(page: str):
    for path in re.findall(r"`((?:c2f_ray|configs|examples|tests|benchmarks|cluster)/[\w./-]+\.\w+)`", TEXTS[page]):
        assert (ROOT / path).is_file(), path
    for path, name in re.findall(r"`(c2f_ray/[\w/]+\.py)`, `(\w+)`", TEXTS[page]):
        assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()), f"{path} has no {name}"


def written_metrics() -> set[str]:
    """The keys of metrics.jsonl: literals in the driver and the learner, and those that are put together."""
    folders = ("driver", "algorithms", "learner", "recipe")
    trees = [ast.parse(path.read_text()) for folder in folders for path in (ROOT / "c2f_ray" / folder).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    metric = re.compile(
        r"(prompts|reward|length|learner|critic|kl|logprob_gap|importance|selection|heldout|weights|time)/\w*[a-z]\w*"
    )
    loop = "".join(path.read_text() for path in (ROOT / "c2f_ray" / "driver").glob("*.py"))
    stages = re.findall(r'\.timed\("(\w+)"', loop)
    return (
        {word for word in words if metric.fullmatch(word)}
        | {"step", "rewards/NAME"}
        | {f"cm/{field.name}" for field in fields(LengthDecision)}
        | {f"time/{stage}_s" for stage in stages}
    )


def test_every_metric_is_explained_and_every_one_explained_is_written():
    lines = [line for text in TEXTS.values() for line in text.splitlines()]
    first_cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    explained = {key for cell in first_cells for key in re.findall(r"`(step|\w+/\w+)`", cell)}
    explained -= {key for key in explained if key.split("/")[0] in ("configs", "benchmarks", "tensorboard")}
    written = written_metrics()
    assert len(written) > 50
    assert sorted(written - explained) == [], "not explained in docs/"
    assert sorted(explained - written) == [], "explained, and never written"


@pytest.mark.parametrize("number", range(3))
def test_hours_gpus_and_disk_are_those_of_plan(number: int):
    recipe = load_recipe(ROOT / "configs" / f"{GPU_RECIPES[number]}.yaml")
    found = estimate(recipe, chosen_nodes(recipe, None, None, 8, None, None), 12.5e9)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", TEXTS["docs/reproducing.md"], flags=re.MULTILINE))
    cells = {row: rows[row].split(" | ")[number] for row in ("recipe", "GPUs of 80 GB", "plan: hours", "plan: disk")}
    assert found.total_steps is not None
    hours = [f"{found.total_steps * step.seconds / 3600:.3g}" for step in found.steps.values()]
    assert cells["recipe"] == f"`configs/{GPU_RECIPES[number]}.yaml`"
    assert cells["GPUs of 80 GB"] == str(sum(node.gpus for node in found.nodes.nodes))
    assert cells["plan: hours"] == " to ".join(dict.fromkeys(hours))
    assert cells["plan: disk"] == f"{sum(found.disk.values()) / 1e9:.3g} GB"


def test_every_merge_method_has_its_source():
    details = TEXTS["docs/merging.md"].split("## Details")[1]
    for method in get_args(MergeMethod):
        assert f"`{method}`" in details or method == "interpolate", method
