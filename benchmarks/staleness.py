"""Sampling while learning, beside one after the other: `python benchmarks/staleness.py`.

Trains configs/tiny.yaml with three seeds each way, and draws all six curves into runs/synchronous-1/report.html. Goal:
the reward that pipelined runs end with is within the noise of seeds of that of synchronous ones.
"""

import json
import os
import platform
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from c2f_ray import load_recipe, train
from c2f_ray.watch.metrics import read_metrics
from c2f_ray.watch.report import write_report

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "staleness.json"
SEEDS = (1, 2, 3)
MODES = {"synchronous": [], "pipelined": ["rollout.max_staleness=1", "learner.importance_clip=2.0"]}
ENDS = 5  # steps that a run's last reward is the mean of
T_95 = 2.776  # Student's t for 4 degrees of freedom, two-sided, 95%


def main() -> None:
    os.chdir(ROOT)
    found: dict[str, dict[str, list[float]]] = {mode: {"reward_last": []} for mode in MODES}
    runs = []
    for seed in SEEDS:
        for mode, settings in MODES.items():
            recipe = load_recipe("configs/tiny.yaml", f"run.name={mode}-{seed}", f"run.seed={seed}", *settings)
            runs.append(train(recipe, fresh=True))
            lines = read_metrics(runs[-1] / "metrics.jsonl")
            found[mode]["reward_last"].append(round(fmean(line["reward/mean"] or 0.0 for line in lines[-ENDS:]), 4))
            print(mode, seed, found[mode], flush=True)
    write_report(runs[0], runs[1:])
    rewards = [found[mode]["reward_last"] for mode in MODES]
    difference = fmean(rewards[1]) - fmean(rewards[0])
    noise = T_95 * sqrt(sum(stdev(each) ** 2 for each in rewards) / len(SEEDS))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seeds": SEEDS,
        **found,
        "pipelined_minus_synchronous": round(difference, 4),
        "half_of_95_percent_interval": round(noise, 4),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())
    print(f"goal reward: {difference:+.3f} (within +-{noise:.3f}) {'ok' if abs(difference) <= noise else 'missed'}")


if __name__ == "__main__":
    main()
