"""The files in cluster/: their schemas, Ray's token everywhere, and room for every recipe."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from ray.autoscaler._private.util import prepare_config

from c2f_ray.errors import RecipeError
from c2f_ray.plan.clusters import Node, actors_of, place, read_cluster
from c2f_ray.plan.estimate import estimate
from c2f_ray.recipe import load_recipe

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = [CLUSTER / name for name in ("aws.yaml", "gcp.yaml", "onprem.yaml")]
KUBERAY = [CLUSTER / "kuberay" / name for name in ("raycluster.yaml", "rayjob.yaml")]
SLURM = CLUSTER / "slurm.sh"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_files_follow_rays_schema(path):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(read(path))] == []


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_files_keep_the_token_on_and_the_dashboard_on_loopback(path):
    content = read(path)
    assert content["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in content[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command.partition("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert ".bashrc" in content["setup_commands"][-1]
    assert "RAY_AUTH_MODE=token" in content["setup_commands"][-1]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_node_types_are_the_roles_and_the_head_has_no_gpu(name):
    content = read(CLUSTER / f"{name}.yaml")
    types = content["available_node_types"]
    assert list(types) == ["head", "rollout", "reward", "learner"]
    assert "GPU" not in types[content["head_node_type"]]["resources"]
    assert all(types[role]["resources"]["GPU"] > 0 for role in ("rollout", "reward", "learner"))
    assert sum(types[role]["max_workers"] for role in ("rollout", "reward", "learner")) <= content["max_workers"]


def test_machines_on_premises_are_those_that_ray_is_given():
    content = read(CLUSTER / "onprem.yaml")
    machines = content["metadata"]["nodes"]
    assert [machine["type"] for machine in machines] == ["head", "rollout", "reward", "learner"]
    assert len(machines) == 1 + len(content["provider"]["worker_ips"])
    (node_type,) = prepare_config(content)["available_node_types"].values()  # as `ray up` reads it
    assert (node_type["min_workers"], node_type["max_workers"]) == (3, 3)


def fields(required: str, others: str = "", **kinds: dict) -> dict:
    """A schema of an object: names of text fields, and what other fields are."""
    named = {name: {"type": "string"} for name in f"{required} {others}".split() if name not in kinds}
    return {"type": "object", "required": required.split(), "properties": named | kinds}


def listed(items: dict, **settings: int) -> dict:
    return {"type": "array", "items": items, "minItems": 1, **settings}


def text(*values: str) -> dict:
    return {"type": "string", "enum": list(values)}


AMOUNTS = fields("cpu memory", "nvidia.com/gpu")
CONTAINER = fields(
    "name image env resources volumeMounts",
    env=listed(
        fields("name", "value", valueFrom=fields("secretKeyRef", secretKeyRef=fields(
            "name key optional", optional={"type": "boolean"},
        )))
    ),
    ports=listed(fields("containerPort name", containerPort={"type": "integer"})),
    resources=fields("limits requests", limits=AMOUNTS, requests=AMOUNTS),
    volumeMounts=listed(fields("mountPath name"), contains=fields("mountPath name", mountPath=text("/dev/shm"))),
)  # fmt: skip
POD = fields(
    "spec",
    spec=fields(
        "securityContext containers volumes",
        securityContext=fields("fsGroup", fsGroup={"type": "integer"}),
        nodeSelector=fields("nvidia.com/gpu.product"),
        tolerations=listed(fields("key operator effect")),
        containers=listed(CONTAINER, maxItems=1),
        volumes=listed(
            fields(
                "name",
                emptyDir=fields("medium sizeLimit", medium=text("Memory")),
                persistentVolumeClaim=fields("claimName"),
            )
        ),
    ),
)
COUNT = {"type": "integer", "minimum": 1}
CLUSTER_SPEC = fields(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=text(ray.__version__),
    authOptions=fields("mode secretName", mode=text("token")),
    headGroupSpec=fields("rayStartParams template", rayStartParams=fields("num-cpus"), template=POD),
    workerGroupSpecs=listed(
        fields(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=fields(""), template=POD,
        ),
        minItems=3,
    ),
)  # fmt: skip
JOB_SPEC = fields(
    "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished rayClusterSpec",
    submissionMode=text("K8sJobMode"),
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean", "enum": [True]},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
)


@pytest.fixture(scope="module")
def validate(tmp_path_factory):
    """cluster/kuberay/validate.py's `problems`, with the fields that we use for definitions."""
    spec = importlib.util.spec_from_file_location("validate", CLUSTER / "kuberay/validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("crds")
    for kind, part in (("RayCluster", CLUSTER_SPEC), ("RayJob", JOB_SPEC)):
        whole = fields("apiVersion kind metadata spec", metadata={"type": "object"}, spec=part)
        version = {"name": "v1", "schema": {"openAPIV3Schema": whole}}
        (folder / module.DEFINITIONS[kind]).write_text(yaml.safe_dump({"spec": {"versions": [version]}}))
        Draft202012Validator.check_schema(whole)
    return lambda manifest: module.problems(manifest, folder)


def test_manifests_follow_our_schema(validate):
    assert [validate(path) for path in KUBERAY] == [[], []]


def test_a_mistyped_field_of_a_manifest_is_found(validate, tmp_path):
    content = (
        KUBERAY[0].read_text().replace("medium: Memory", "mediums: Memory").replace("mode: token", "mode: disabled")
    )
    (tmp_path / "raycluster.yaml").write_text(content)
    found = "\n".join(validate(tmp_path / "raycluster.yaml"))
    assert "spec.authOptions.mode: 'disabled' is not one of ['token']" in found
    assert "volumes.0.emptyDir: Additional properties are not allowed ('mediums' was unexpected)" in found


def test_both_manifests_bring_up_the_same_cluster():
    cluster, job = map(read, KUBERAY)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    groups = cluster["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["rollout", "reward", "learner"]
    limits = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits
    command, recipe, *overrides = job["spec"]["entrypoint"].removeprefix("c2f-ray ").split()
    assert command == "train"
    assert load_recipe(ROOT / recipe, *overrides).run.folder == "/shared/runs"


ROOM = {
    "aws": [("head", 0), ("rollout", 8), ("learner", 8)],
    "gcp": [("head", 0), ("rollout", 8), ("reward", 4), ("learner", 4)],
    "onprem": [("head", 0), ("rollout", 8), ("reward", 4), ("learner", 4)],
    "raycluster": [("head", 0), ("rollout", 8), ("reward", 4), ("learner", 4)],
    "rayjob": [("head", 0), ("rollout", 8), ("reward", 4), ("learner", 4)],
    "slurm": [("node", 8), ("node", 8)],
}


@pytest.mark.parametrize("path", [*RAY_UP, *KUBERAY, SLURM], ids=lambda path: path.stem)
def test_every_recipe_fits_every_cluster(path):
    nodes = read_cluster(path)
    assert [(node.kind, node.gpus) for node in nodes.nodes] == ROOM[path.stem]
    for file in RECIPES:
        recipe = load_recipe(file)
        assert place(actors_of(recipe), nodes.nodes)[1] == [], file.stem
        if recipe.learner.gpus_per_rank:
            assert estimate(recipe, nodes, 12.5e9).problems == [], file.stem


def test_a_cluster_file_that_does_not_say_its_gpus_is_refused(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text((CLUSTER / "aws.yaml").read_text().replace("gpu: A100-80G", "gpu: T4"))
    with pytest.raises(RecipeError, match="metadata.gpu: 'T4' is not one of A100-40G"):
        read_cluster(file)
    file.write_text((CLUSTER / "aws.yaml").read_text().replace("  gpu: A100-80G", "  other: A100-80G"))
    with pytest.raises(RecipeError, match="says nowhere what its GPUs are; add metadata.gpu"):
        read_cluster(file)
    file.write_text("cluster_name: x")
    with pytest.raises(RecipeError, match="neither a file of ray up"):
        read_cluster(file)


def test_a_head_that_gives_no_cpus_takes_no_actors():
    assert read_cluster(KUBERAY[0]).nodes[0] == Node("head", 0, 0)


@pytest.mark.skipif(SHELLCHECK is None, reason="make setup installs shellcheck")
@pytest.mark.parametrize("script", [SLURM, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shell_scripts(script):
    ran = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


STUBS = {
    "scontrol": "echo node-a; echo node-b",
    # Runs what it is given here, and writes down where it should have run.
    "srun": 'while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && node="${1#*=}"; shift; done; '
    'SRUN_NODE="$node" "$@"',
    "hostname": "echo 10.1.2.3 fe80::1",
    "ray": 'echo "$SRUN_NODE $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c < "$RAY_AUTH_TOKEN_PATH") $*"'
    ' >> "$LOG"',
    # The nodes that have joined, when both have.
    "python3": 'while [ "$(grep -c " token " "$LOG" 2> /dev/null)" != 2 ]; do sleep 0.05; done; echo 2',
    "c2f-ray": 'echo "run $RAY_ADDRESS $*" >> "$LOG"; [ "$4" != wait ] || { trap "echo stopped >> $LOG; exit 3" TERM; '
    "while :; do sleep 0.05; done; }",
}


def slurm(folder: Path, *arguments: str) -> tuple[subprocess.Popen, Path]:
    """cluster/slurm.sh on a machine without Slurm: stubs write down what they are called with."""
    binaries = folder / "venv/bin"
    binaries.mkdir(parents=True)
    for name, body in STUBS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(stat.S_IRWXU)
    env = {
        "HOME": str(folder), "PATH": "/usr/bin:/bin", "LOG": str(folder / "log"), "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "96",
    }  # fmt: skip
    return subprocess.Popen(["bash", str(SLURM), *arguments], cwd=folder, env=env), folder / "log"


def test_slurm_script_starts_ray_on_every_node_with_a_token_of_its_own(tmp_path):
    script, log = slurm(tmp_path, "configs/tiny.yaml", "run.seed=2")
    assert script.wait(30) == 0
    lines = sorted(log.read_text().splitlines())
    common = "token 600 64 start --block --num-gpus=8 --num-cpus=96"
    assert lines == [
        f"node-a {common} --head --node-ip-address=10.1.2.3 --port=24567 --include-dashboard=false",
        f"node-b {common} --address=10.1.2.3:24567",
        "run 10.1.2.3:24567 train configs/tiny.yaml run.seed=2",
    ]
    assert list((tmp_path / ".cache").iterdir()) == []  # the token is gone


def test_slurm_script_hands_the_signal_on_and_ends_as_the_run_does(tmp_path):
    script, log = slurm(tmp_path, "configs/tiny.yaml", "run.seed=2", "wait")
    while not (log.is_file() and "run " in log.read_text()):
        assert script.poll() is None
    script.terminate()
    assert script.wait(30) == 3
    assert log.read_text().splitlines()[-1] == "stopped"
