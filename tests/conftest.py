"""Shared by all tests: one Ray session and one set of tiny models, both made once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A cluster that happens to run on this machine is never joined, and nothing is fetched.
os.environ["RAY_ADDRESS"] = "local"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's folders, from a few training steps: the layout is the demo's, the models know nothing."""
    from c2f_ray.tiny.world import build_world

    return build_world(tmp_path_factory.mktemp("tiny") / "world", effort="smoke")


@pytest.fixture(scope="session")
def checkout(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes folders that are like a checkout after the demo: its recipes, its examples, and the world for them."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / ".cache").mkdir()
        (folder / ".cache" / "tiny").symlink_to(world, target_is_directory=True)
        for each in ("configs", "examples"):
            (folder / each).symlink_to(Path(__file__).parents[1] / each, target_is_directory=True)
        return folder

    return make


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
