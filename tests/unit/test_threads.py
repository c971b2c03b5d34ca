"""CPU threads of the actors."""

import os
from pathlib import Path

import pytest

from c2f_ray.runtime.threads import available_cores, thread_env


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may use eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def test_actors_that_work_at_the_same_time_share_the_cores(cores: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("c2f_ray.runtime.threads.CGROUP_QUOTA", Path("/none"))
    assert thread_env(None, 2)["OMP_NUM_THREADS"] == "4"
    assert thread_env(None, 3)["OMP_NUM_THREADS"] == "2"
    assert thread_env(None, 20)["OMP_NUM_THREADS"] == "1"
    assert thread_env(5, 2)["OMP_NUM_THREADS"] == "5", "the recipe's setting comes first"


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_bounds_the_cores(cores: None, tmp_path: Path, quota: str, expected: int):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path / "cpu.max") == expected
