"""A merge that is killed at any point and run again ends with the bytes of an undisturbed one. No Ray."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.merging import job, shards
from c2f_ray.merging import plan as planning
from c2f_ray.merging.compatibility import Models, check_inputs
from c2f_ray.merging.files import OutputFile
from c2f_ray.merging.job import run_merge
from c2f_ray.merging.plan import MergePlan, check_merge
from c2f_ray.recipe import load_recipe
from c2f_ray.tiny.tokenizer import policy_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 16, "vocab_size": 40}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Three models of two weight files each, and a merge that runs its tasks here, one after the other."""
    for seed, role in enumerate(("base", "coarse", "instruct")):
        policy_tokenizer(with_template=True).save_pretrained(tmp_path / role)
        (tmp_path / role / "config.json").write_text(json.dumps(CONFIG))
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.weight": torch.randn(50, generator=generator) for i in range(4)}
        save_file(tensors, tmp_path / role / "model.safetensors")
    monkeypatch.setattr(planning, "SHARD_BYTES", (400, 400))
    checked: list[Models] = []  # only once: it is most of the time, and the models stay as they are

    def check_once(*given: object) -> Models:
        checked[:] = checked or [check_inputs(*given)]
        return checked[0]

    monkeypatch.setattr(planning, "check_inputs", check_once)
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def run_here(plan: MergePlan, todo: list[shards.Shard], _: str) -> None:
        files = {role: {name: spec.file for name, spec in t.items()} for role, t in plan.models.tensors.items()}
        for shard in todo:
            shards.merge_shard(shard, shards.Work(files, {}, plan.todo, plan.settings, plan.aside))

    monkeypatch.setattr(job, "_run_tasks", run_here)
    monkeypatch.setattr(job, "_strategy", lambda _: "")
    return tmp_path


def plan_in(root: Path, run: str, *overrides: str) -> MergePlan:
    models = [f"merge.{role}={root / role}" for role in ("base", "coarse", "instruct")]
    methods = ["merge.methods=[residue, dare]", "merge.ratios=[0.25]"]
    return check_merge(
        load_recipe(CONFIGS / "tiny.yaml", f"run.folder={root}", f"run.name={run}", *models, *methods, *overrides)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Death(BaseException):
    """The process is gone: nothing that it would still do, such as cleaning up, happens."""


# All through which a merge changes what is on the disk; the first take room there.
WRITES = [(Path, name) for name in ("rename", "mkdir", "touch", "write_text")]
WRITES += [(OutputFile, "write"), (os, "fsync"), (shutil, "copyfile")]
STEPS = [*WRITES, (Path, "unlink"), (shutil, "rmtree")]  # a removal half done: below


def run_and_die(root: Path, at: int) -> bool:
    """Merge, and die at the step number ``at``; whether it came to it."""
    try:
        run_until(root, at, STEPS, Death())
    except Death:
        return True
    return False


def run_until(root: Path, at: int, steps: list[tuple[Any, str]], end: BaseException) -> None:
    """Merge, with all from the step number ``at`` on raising ``end``."""
    done = 0

    def ending(do: Callable) -> Callable:
        def step(*args, **options):
            nonlocal done
            done += 1
            if done >= at:
                raise end
            return do(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in steps:
            patch.setattr(owner, name, ending(getattr(owner, name)))
        run_merge(plan_in(root, "killed"))


def test_killed_at_any_point_and_run_again(root):
    run_merge(plan_in(root, "undisturbed"))
    expected = contents(root / "undisturbed")
    assert len([name for name in expected if name.endswith(".safetensors")]) == 2 * 2
    at, went_on = 1, 0
    while run_and_die(root, at):
        fine = root / "killed" / "fine"
        for folder in fine.glob("*"):  # what is there is whole
            assert contents(folder) == contents(root / "undisturbed" / "fine" / folder.name)
        went_on += any((root / "killed").glob("fine.partial/records/*"))
        run_merge(plan_in(root, "killed"))
        assert contents(root / "killed") == expected
        shutil.rmtree(root / "killed")
        at += 1
    assert at > 50
    assert went_on > 25


def test_a_disk_that_fills_up_at_any_point(root):
    """Every failure has one clear error, leaves whole models or none, and is made good by merging again."""
    run_merge(plan_in(root, "undisturbed"))
    expected = contents(root / "undisturbed")
    full = OSError(errno.ENOSPC, "No space left on device")
    at = 1
    while True:
        try:
            run_until(root, at, WRITES, full)
            break
        except C2FError as error:
            said = f"merge: the disk is full: not all could be written into {root / 'killed' / 'fine.partial'}."
            assert str(error).startswith(said)
        for folder in (root / "killed" / "fine").glob("*"):
            assert contents(folder) == contents(root / "undisturbed" / "fine" / folder.name)
        run_merge(plan_in(root, "killed"))
        assert contents(root / "killed") == expected
        shutil.rmtree(root / "killed")
        at += 1
    assert at > 40


def test_what_is_finished_is_not_done_again_and_only_for_the_same_merge(root, monkeypatch):
    merged = []
    merge_shard = shards.merge_shard

    def failing(shard: shards.Shard, work: shards.Work) -> None:
        merged.append(shard.file_name)
        if len(merged) == 2:
            raise C2FError("the disk is full")
        merge_shard(shard, work)

    monkeypatch.setattr(shards, "merge_shard", failing)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with pytest.raises(C2FError, match="the disk is full"):
        run_merge(plan_in(root, "run"))
    assert not (root / "run" / "fine").exists()
    run_merge(plan_in(root, "run"))
    assert merged == [first, second, second]
    # Another seed, another input: everything again.
    for change in (["run.seed=2"], []):
        merged.clear()
        with pytest.raises(C2FError):
            run_merge(plan_in(root, "other", "merge.ratios=[0.125]"))
        if not change:
            os.utime(root / "coarse" / "model.safetensors")
        run_merge(plan_in(root, "other", "merge.ratios=[0.125]", *change))
        assert merged == [first, second, first, second]
        shutil.rmtree(root / "other")


def merge_one_shard(plan: MergePlan) -> None:
    """And die."""
    merge_shard = shards.merge_shard

    def dying(shard: shards.Shard, work: shards.Work) -> None:
        merge_shard(shard, work)
        raise Death

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "merge_shard", dying)
        with pytest.raises(Death):
            run_merge(plan)


def half_removed(folder: Path, **_: object) -> None:
    """A removal that is killed when the weights are gone, and the records of them are not."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    raise Death


def test_killed_while_the_work_of_another_merge_is_removed(root, monkeypatch):
    """What is left of it is not gone on with: its records tell of weights that are gone."""
    run_merge(plan_in(root, "undisturbed"))
    merge_one_shard(plan_in(root, "run"))
    assert plan_in(root, "run").goes_on()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(Death):
            run_merge(plan_in(root, "run", "merge.ratios=[0.5]"))
    assert list((root / "run" / "fine.partial").rglob("records/*.json"))
    run_merge(plan_in(root, "run"))
    assert contents(root / "run") == contents(root / "undisturbed")


def test_finished_models_stay_and_others_come_beside_them(root):
    run_merge(plan_in(root, "run"))
    before = contents(root / "run" / "fine")
    again = plan_in(root, "run", "merge.timeout_s=7", "merge.methods=[residue]")
    assert (again.todo, again.goes_on()) == ([], False)
    more = plan_in(root, "run", "merge.ratios=[0.25, 0.5]", "merge.scale=0.5", "merge.methods=[residue, ties]")
    assert [variant.name for variant in more.todo] == ["residue-0.5", "ties-0.25", "ties-0.5"]
    run_merge(more)
    after = contents(root / "run" / "fine")
    assert before.items() <= after.items()
    assert len(after) == len(before) // 2 * 5
    assert not (root / "run" / "fine.partial").exists()
    said = r"merge: \S+dare-0\.25 is there, of other inputs, settings or versions, and is not overwritten: remove it"
    with pytest.raises(RecipeError, match=said):
        plan_in(root, "run", "run.seed=2")
    os.utime(root / "base" / "model.safetensors")
    with pytest.raises(RecipeError, match=r"residue-0\.25 is there, of other inputs"):
        plan_in(root, "run")
    (root / "run" / "fine" / "dare-0.25" / "merge.json").unlink()
    with pytest.raises(RecipeError, match=r"dare-0\.25 is there, of other inputs"):
        plan_in(root, "run")


def test_work_on_a_model_that_was_removed_since_is_not_gone_on_with(root):
    """Two models were there and a third was under way: its work knows nothing of the first."""
    run_merge(plan_in(root, "run"))
    expected = contents(root / "run" / "fine" / "residue-0.25")
    more = ["merge.methods=[residue]", "merge.ratios=[0.25, 0.5]"]
    merge_one_shard(plan_in(root, "run", *more))
    assert plan_in(root, "run", *more).goes_on()
    shutil.rmtree(root / "run" / "fine" / "residue-0.25")
    assert not plan_in(root, "run", *more).goes_on()
    run_merge(plan_in(root, "run", *more))
    assert contents(root / "run" / "fine" / "residue-0.25") == expected
