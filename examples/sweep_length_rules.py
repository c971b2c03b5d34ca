"""Which length rule earns most? One run for each, one after the other: a run takes the whole cluster.

`python examples/sweep_length_rules.py [RECIPE] [key=value ...]`; then `c2f-ray report RUN OTHER ...` draws their curves
in one report.
"""

import json
import sys

from c2f_ray import load_recipe, train

RULES = {
    "fixed": "{rule: fixed, max_tokens: 96}",
    "linear": "{rule: linear, start_tokens: 16, max_tokens: 96, over_steps: 24}",
    "logistic": "{rule: logistic, start_tokens: 16, max_tokens: 96, max_step_tokens: 5}",
}

path, *overrides = sys.argv[1:] or ["configs/tiny.yaml"]
for name, rule in RULES.items():
    folder = train(load_recipe(path, f"run.name=length_{name}", f"length={rule}", *overrides))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    print(
        f"{folder}: reward {last['reward/mean']:.2f} at {last['length/mean']:.0f} tokens, limit {last['length/limit']}"
    )
