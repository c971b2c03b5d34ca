"""A merge whose process is killed, and one whose disk fills up: no half model, and the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.merging import plan as planning
from c2f_ray.merging.job import merge, run_merge
from c2f_ray.merging.plan import check_merge
from c2f_ray.recipe import load_recipe
from c2f_ray.tiny.tokenizer import policy_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 16, "vocab_size": 40}
ROLES = ("base", "coarse", "instruct")


def make_models(root: Path, layers: int, elements: int) -> None:
    for seed, role in enumerate(ROLES):
        policy_tokenizer(with_template=True).save_pretrained(root / role)
        (root / role / "config.json").write_text(json.dumps(CONFIG))
        some = torch.randn(10_007, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        layer = some.repeat(elements // some.numel() + 1)[:elements]
        save_file({f"model.layers.{i}.weight": layer + i for i in range(layers)}, root / role / "model.safetensors")


def arguments(root: Path, out: Path) -> list[str]:
    section = {role: str(root / role) for role in ROLES} | {"methods": ["residue", "interpolate"], "ratios": [0.3]}
    return [str(CONFIGS / "tiny.yaml"), f"run.folder={out}", "run.name=run", f"merge={json.dumps(section)}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_free_cpu(cluster: None) -> Iterator[None]:
    """Tasks run one after the other, so that a kill meets some before, in and after their work."""
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])
    ray.get(group.ready(), timeout=1800)
    yield
    ray.util.remove_placement_group(group)


def test_a_command_killed_in_the_middle_and_run_again(one_free_cpu, tmp_path):
    """Four weight files of 25 MB each; the second is being written when SIGKILL comes."""
    make_models(tmp_path, layers=4, elements=12_500_000)
    undisturbed, killed = tmp_path / "undisturbed" / "run", tmp_path / "killed" / "run"
    merge(load_recipe(*arguments(tmp_path, undisturbed.parent)))
    expected = contents(undisturbed)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 2 * 4

    command = [sys.executable, "-m", "c2f_ray", "merge", *arguments(tmp_path, killed.parent)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    aside = killed / "fine.partial"
    deadline = time.monotonic() + 120
    while not (any(aside.glob("records/*.json")) and any(aside.glob("tmp/*"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = len(list(aside.glob("records/*.json")))
    assert process.returncode == -signal.SIGKILL
    assert 1 <= finished < 4
    assert not (killed / "fine").exists()

    merge(load_recipe(*arguments(tmp_path, killed.parent)))
    assert contents(killed) == expected


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(cluster, tmp_path, monkeypatch, small_disk):
    """Of 1 MiB; four weight files of 60 kB for each of two fine actors."""
    make_models(tmp_path, layers=4, elements=30_000)
    monkeypatch.setattr(planning, "SHARD_BYTES", (60_000, 60_000))
    merge(load_recipe(*arguments(tmp_path, tmp_path / "undisturbed")))
    recipe = load_recipe(*arguments(tmp_path, small_disk))
    plan = check_merge(recipe)
    other = small_disk / "other"
    other.write_bytes(bytes(700_000))
    with pytest.raises(RecipeError, match=r"2 models need 0\.0 GiB and \S+ has 0\.0 free"):
        check_merge(recipe)
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    with pytest.raises(C2FError, match=r"the disk is full: not all could be written into \S+fine\.partial\. Make room"):
        run_merge(plan)
    assert [path.name for path in (small_disk / "run").iterdir()] == ["fine.partial"]
    other.unlink()
    run_merge(check_merge(recipe))
    assert contents(small_disk / "run") == contents(tmp_path / "undisturbed" / "run")
