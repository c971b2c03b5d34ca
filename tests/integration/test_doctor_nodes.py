"""`c2f-ray doctor --all-nodes` on a real Ray cluster, whose only node stands for two."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from c2f_ray.cli import app
from c2f_ray.doctor import cluster as checks
from c2f_ray.doctor.node import Finding, ok
from c2f_ray.recipe import load_recipe
from tests.documented import ROOT, documented

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the node cannot import this file
CONFIG = ROOT / "configs" / "tiny.yaml"


def light(recipe) -> list[Finding]:
    """In place of a node's own checks, which have tests of their own."""
    return [ok(f"recipe {recipe.run.name}")]


def test_every_node_is_checked_and_they_reach_each_other(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nodes = ray.nodes() * 2
    monkeypatch.setattr(checks, "_alive", lambda: nodes)
    monkeypatch.setattr(checks, "check_node", light)
    recipe = load_recipe(CONFIG, f"run.folder={tmp_path}/runs", "learner.ranks=20")
    found = [
        (where, [str(finding) for finding in findings]) for where, findings in checks.diagnose(recipe, all_nodes=True)
    ]
    here, (where, of_ray), *each, between = found
    assert here == ("this machine", ["ok       recipe tiny"])
    assert where == "Ray"
    token, guarded, no_room = of_ray
    assert "Ray's token: " in token
    assert guarded == "ok       Ray: refuses a wrong token"
    # An engine and a reward worker as well: 22 actors on 16 CPUs.
    assert no_room.startswith(
        "failure  Ray: 2 nodes, 0 GPUs, 16 CPUs: 6 of the recipe's actors (learner) find no room; "
    )
    assert each == [(f"node {nodes[0]['NodeManagerAddress']}", ["ok       recipe tiny"])] * 2
    assert between == (
        "between nodes",
        [f"ok       run folder: all nodes see {tmp_path}", "ok       broadcast over gloo: between 2 nodes"],
    )
    assert list(tmp_path.iterdir()) == []  # nothing is left of the file that was looked for
    assert ray.is_initialized()  # a session that was there stays


def test_the_command_says_how_this_machine_is(
    cluster: None, checkout: Callable[[str], Path], monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """What is wrong with it is not known here: the exit code says whether anything is."""
    monkeypatch.chdir(checkout("doctor"))
    for command, named in ((documented("c2f-ray doctor"), 0), (documented("c2f-ray doctor configs/tiny.yaml"), 3)):
        with pytest.raises(SystemExit) as end:
            app(command, standalone_mode=False)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if not line.startswith(" ")] == ["this machine:", "Ray:"]
        assert end.value.code == any(line.startswith("  failure") for line in lines)
        assert sum("/tiny/data/" in line for line in lines) == named, lines
