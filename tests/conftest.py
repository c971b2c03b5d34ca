"""Shared by all tests: one Ray session and one set of tiny models, both made once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A cluster that happens to run on this machine is never joined, and nothing is fetched.
os.environ["RAY_ADDRESS"] = "local"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def world() -> Path:
    """The folder of the tiny world that ships with the package. No test writes into it."""
    from c2f_ray.recipe.location import TINY_DATA

    return TINY_DATA


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes working directories with the checkout's recipes and examples."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
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
