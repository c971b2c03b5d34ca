"""ReMax and PPO on the tiny world from the same start: `python benchmarks/algorithms.py`.

Trains configs/tiny.yaml and configs/tiny_ppo.yaml, and draws both into
runs/tiny/report.html. Goal: each one's sampled reward ends above where it started.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

from c2f_ray.watch.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "algorithms.json"
RUNS = {"remax": "tiny", "ppo": "tiny_ppo"}
ENDS = 3  # steps that the first and the last reward are means of


def main() -> None:
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"}
    for algorithm, name in RUNS.items():
        c2f_ray("train", f"configs/{name}.yaml", "--fresh")
        lines = read_metrics(ROOT / "runs" / name / "metrics.jsonl")
        reward = [float(line["reward/mean"] or 0.0) for line in lines]
        figures = {
            "steps": len(lines),
            "reward_first": round(fmean(reward[:ENDS]), 3),
            "reward_last": round(fmean(reward[-ENDS:]), 3),
            "kl_last": round(float(lines[-1]["kl/sequence"] or 0.0), 2),
            "update_seconds": round(median(float(line["time/learner_s"] or 0.0) for line in lines), 3),
        }
        result[algorithm] = figures
        first, last = figures["reward_first"], figures["reward_last"]
        print(f"goal {algorithm} reward: {last} (> {first}) {'ok' if last > first else 'missed'}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    first, *others = (f"runs/{name}" for name in RUNS.values())
    c2f_ray("report", first, *others)


def c2f_ray(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "c2f_ray", *arguments], cwd=ROOT, check=True, timeout=1800)


if __name__ == "__main__":
    main()
