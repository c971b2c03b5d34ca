"""A wheel has everything that the tiny recipes need: recipes, models, prompts."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from safetensors.torch import load_file

from c2f_ray.recipe.location import TINY_DATA
from c2f_ray.tiny.manifest import differences
from tests.documented import ROOT, documented


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it; what it depends on is that of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    install = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--python",
        str(python),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_two_steps_from_the_wheel_in_a_folder_that_is_no_checkout(python: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import c2f_ray; print(c2f_ray.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    package = Path(found.stdout.strip()).parent
    assert python.parents[1] in package.parents, "not this checkout's"
    assert differences(package / "tiny" / "data") == []
    command = [
        "-m",
        "c2f_ray",
        *documented("c2f-ray train tiny"),
        "run.steps=2",
        "prompts.per_step=8",
        "length.max_tokens=20",
    ]
    done = subprocess.run(
        [str(python), *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "coarse actor: runs/tiny/coarse" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    base, coarse = (
        load_file(folder / "model.safetensors") for folder in (TINY_DATA / "base", tmp_path / "runs/tiny/coarse")
    )
    assert sum(not coarse[name].equal(base[name].float()) for name in base) > len(base) / 2
