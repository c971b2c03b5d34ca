"""`ray job submit` on a cluster of three nodes with Ray's token, on this machine; and what a run gives away."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from c2f_ray.watch.metrics import read_metrics
from c2f_ray.watch.report import write_report
from tests.documented import documented

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 1800
PLANTED = {name: f"planted-{secrets.token_hex(8)}" for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY")}

# Scores two steps of four prompts, sampled and greedy, and then waits for a file.
GATED = """
import os, time
from pathlib import Path

scored = 0

def score(samples):
    global scored
    scored += len(samples)
    folder = Path(__file__).parent
    if scored > 16 and not (folder / "open").exists():
        (folder / "seen").write_text(" ".join(os.environ.get(name, "-") for name in ("NCCL_DEBUG", "WANDB_SILENT")))
        while not (folder / "open").exists():
            time.sleep(0.1)
    return [float(len(sample.response)) for sample in samples]
"""


@dataclass(frozen=True)
class Nodes:
    address: str  # of the dashboard
    env: dict[str, str]
    session: Path

    def ray(self, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", *arguments], cwd=cwd, env=self.env | env, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def status(self, authorization: str | None) -> int:
        """The answer's status to a request for the list of jobs."""
        headers = {} if authorization is None else {"Authorization": authorization}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def wait_until(found: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not found():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}"
        time.sleep(0.1)


def environment(folder: Path) -> dict[str, str]:
    """Ray's and our code, the gated reward in `folder`, and secrets, in place of this process's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{folder}"}
    return kept | paths | PLANTED | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def kill(processes: list[psutil.Process]) -> None:
    """And all that they started."""
    family = set(processes)
    for process in processes:
        if process.is_running():
            family.update(process.children(recursive=True))
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=30)


def mentions(process: psutil.Process, text: str) -> bool:
    try:
        return any(text in argument for argument in process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    (folder / "gated.py").write_text(GATED)
    return folder


@pytest.fixture
def nodes(folder: Path) -> Iterator[Nodes]:
    """A head and two nodes, as `ray start` makes them. Only the dashboard's address is known to their user."""
    session = Path(tempfile.mkdtemp(prefix="c2f-", dir="/tmp"))  # Ray's sockets need a short path
    token = session / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    env = environment(folder) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, client = free_ports(3)

    def start(*arguments: str) -> None:
        own = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        for _ in range(3):  # a node whose agents take 15 s to start, as on a busy machine, gives up
            started = subprocess.run(
                [
                    BIN / "ray", "start", "--num-cpus=2", f"--temp-dir={session}", "--node-ip-address=127.0.0.1",
                    *(f"--{name}-port={port}" for name, port in zip(own, free_ports(4), strict=True)), *arguments,
                ],
                env=env, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            if started.returncode == 0:
                return
        pytest.fail(started.stdout)

    try:
        start(
            "--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        )  # fmt: skip
        for _ in range(2):
            start(f"--address=127.0.0.1:{gcs}")
        yield Nodes(f"http://127.0.0.1:{dashboard}", env, session)
    finally:
        kill([process for process in psutil.process_iter() if mentions(process, str(session))])
        shutil.rmtree(session, ignore_errors=True)


def train_command(world: Path, folder: Path, name: str) -> list[str]:
    """Four steps; only a stop writes a checkpoint before the last."""
    return [
        "c2f-ray", "train", str(ROOT / "configs/tiny.yaml"), f"run.name={name}", f"run.folder={folder / 'runs'}",
        "run.steps=4", "prompts.per_step=4", "checkpoints.every_steps=100", "length.max_tokens=24",
        "cluster.start_timeout_s=1800", f"policy.model={world / 'base'}",
        f"prompts.source={world / 'prompts/train.jsonl'}",
        f"policy.chat_template={world / 'instruct/chat_template.jinja'}",
        'reward={"kind": "function", "function": "gated:score", "timeout_s": 1800}',
    ]  # fmt: skip


def refuse_secrets(token: str, *texts: str, folders: tuple[Path, ...]) -> None:
    for secret in (*PLANTED.values(), token):
        assert not any(secret in text for text in texts)
        for folder in folders:
            for path in folder.rglob("*"):
                assert not path.is_file() or secret.encode() not in path.read_bytes(), f"a secret is in {path}"


def test_submitted_followed_stopped_and_gone_on_with(
    nodes: Nodes, world: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    token = (nodes.session / "token").read_text()
    assert nodes.status(f"Bearer {token}") == 200
    assert nodes.status(None) == 401
    assert nodes.status("Bearer " + secrets.token_hex(32)) == 403

    at = ("--address", nodes.address)
    command = train_command(world, folder, "submitted")
    submit = ("job", "submit", *at, "--runtime-env", str(ROOT / "cluster/runtime_env.yaml"))
    refused = nodes.ray(*submit, "--", *command, RAY_AUTH_TOKEN="wrong")
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout
    assert not (folder / "runs").exists()

    submitted = nodes.ray(*submit, "--no-wait", "--submission-id", "first", "--", *command)
    assert submitted.returncode == 0, submitted.stdout
    logs, stop = documented("ray job logs --follow ID"), documented("ray job stop ID")
    follow = subprocess.Popen(
        [BIN / "ray", *logs[:-1], *at, "first"], env=nodes.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_until(lambda: (folder / "seen").exists() or follow.poll() is not None, "the third step's rewards")
        stopped = nodes.ray(*stop[:-1], *at, "first")
        log, _ = follow.communicate()
    finally:
        follow.kill()
    assert stopped.returncode == 0, stopped.stdout + log
    lines = log.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 2, log
    assert "stopped after step 2 of 4; the same command goes on from there" in lines, log
    assert "stopped by SIGTERM; run the same command again" in lines, log
    assert (folder / "seen").read_text() == "WARN true", "what runtime_env.yaml sets reaches the reward worker"
    run = folder / "runs/submitted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]

    (folder / "open").touch()
    again = nodes.ray(*submit, "--submission-id", "second", "--working-dir", str(folder), "--", *command)
    assert again.returncode == 0, again.stdout
    assert f"continues from {run}/checkpoints/step_000002" in again.stdout
    assert "Job 'second' succeeded" in again.stdout
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (run / "coarse/model.safetensors").is_file()

    # What the first job took with it, and what the second took in its place.
    packages = list(nodes.session.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    sent = {package: {path.name for path in package.iterdir()} for package in packages}
    assert any("gated.py" in names for names in sent.values())
    (checkout,) = (package for package, names in sent.items() if "pyproject.toml" in names)
    assert {"c2f_ray", "configs"} <= sent[checkout]
    assert not {".git", ".venv", ".cache", "runs"} & sent[checkout]
    assert (
        sum(path.stat().st_size for path in checkout.rglob("*") if path.is_file()) < 20e6
    )  # 11 MB of it are the tiny world

    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    write_report(run, [])
    (rays,) = nodes.session.glob("session_2*/logs")
    refuse_secrets(token, refused.stdout, submitted.stdout, log, again.stdout, folders=(run, rays))


def test_a_run_of_its_own_listens_on_loopback_alone_and_ends_with_sigterm_in_a_checkpoint(world: Path, folder: Path):
    for name in ("open", "seen"):
        (folder / name).unlink(missing_ok=True)
    out = folder / "out.txt"
    with out.open("w") as file:
        process = psutil.Popen(
            [str(BIN / "python"), "-m", "c2f_ray", *train_command(world, folder, "local")[1:]], cwd=folder, stdout=file,
            stderr=subprocess.STDOUT, env=environment(folder) | {"RAY_ADDRESS": "local"},
        )  # fmt: skip
    try:
        wait_until(lambda: (folder / "seen").exists() or process.poll() is not None, "the third step's rewards")
        assert process.poll() is None, out.read_text()
        listening = {
            (each.name(), connection.laddr.ip)
            for each in [process, *process.children(recursive=True)]
            for connection in each.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM, out.read_text()
    finally:
        kill([process])
    assert len(listening) >= 4
    assert {name for name, ip in listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()
    lines = out.read_text().splitlines()
    assert lines[-2:] == [
        "stopped after step 2 of 4; the same command goes on from there",
        "stopped by SIGTERM; run the same command again",
    ]
    state = json.loads((folder / "runs/local/checkpoints/step_000002/state.json").read_text())["run"]
    assert (state["step"], state["position"]) == (2, 8), "the third step's prompts are to be drawn again"
    refuse_secrets("none planted", out.read_text(), folders=(folder / "runs/local",))
