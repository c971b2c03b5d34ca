"""A signal at any moment of the demo ends it and all that it started, says what to do, and leaves nothing half done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SMALL = [
    "run.steps=2", "prompts.per_step=8", "length.max_tokens=20", "merge.ratios=[0.5]", "evaluate.num_prompts=8",
    "evaluate.max_tokens=16",
]  # fmt: skip
# When a line of the demo's output begins so, the signal is sent: while Ray starts, and in the evaluation.
MOMENTS = {"starting the actors": signal.SIGTERM, "evaluating": signal.SIGINT}


@pytest.mark.parametrize(("moment", "sent"), MOMENTS.items(), ids=lambda value: getattr(value, "name", value))
def test_a_signal_leaves_no_process_and_says_what_to_do(moment: str, sent: signal.Signals, tmp_path: Path):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    log = tmp_path / "log"
    with log.open("w") as file:
        demo = psutil.Popen(
            [sys.executable, "-m", "c2f_ray", "demo", *SMALL],
            cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    family: set[psutil.Process] = set()
    while not any(line.startswith(moment) for line in log.read_text().splitlines()):
        assert demo.poll() is None, log.read_text()
        family.update(demo.children(recursive=True))
        time.sleep(0.2)
    family.update(demo.children(recursive=True))
    demo.send_signal(sent)
    assert demo.wait() == 128 + sent
    assert f"stopped by {sent.name}; run the same command again" in log.read_text()
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    assert [process.name() for process in alive] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "runs"}
