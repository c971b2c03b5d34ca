"""`c2f-ray doctor --all-nodes` on a real Ray cluster of two nodes, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from ray.cluster_utils import Cluster
from c2f_ray.cli import app
from c2f_ray.doctor import cluster, node

def light(recipe):  # the node's own checks have tests of their own
    return [node.ok(f"recipe {recipe.run.name}")]

cluster.check_node = light
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = nodes.address
try:
    app(["doctor", *sys.argv[1:], "--all-nodes"], standalone_mode=False)
finally:
    nodes.shutdown()
"""


def test_every_node_is_checked_and_they_reach_each_other(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "configs/tiny.yaml"), f"run.folder={tmp_path}/runs"],
        capture_output=True, text=True, env=env, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert sum(line.startswith("node ") for line in lines) == 2
    assert lines.count("  ok       recipe tiny") == 3
    # An engine, a reward worker and two ranks on two CPUs.
    (failure,) = (line for line in lines if line.startswith("  failure"))
    assert failure.startswith(
        "  failure  Ray: 2 nodes, 0 GPUs, 2 CPUs: 2 of the recipe's actors (learner) find no room; add nodes"
    )
    assert f"  ok       run folder: all nodes see {tmp_path}" in lines
    assert "  ok       broadcast over gloo: between 2 nodes" in lines
