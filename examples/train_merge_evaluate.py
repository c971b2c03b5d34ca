"""A whole run in one script: `python examples/train_merge_evaluate.py [RECIPE] [key=value ...]`.

Each part goes on from what is there, so a script that was stopped is simply started again.
"""

import sys

from c2f_ray import evaluate, load_recipe, merge, train

path, *overrides = sys.argv[1:] or ["configs/tiny.yaml"]
recipe = load_recipe(path, *overrides)
folder = train(recipe)
fine = merge(recipe)
evaluation = evaluate(recipe)
rewards = {model["name"]: model["metrics"]["reward"] for model in evaluation["models"]}
print(f"{folder}: {len(fine)} fine actors; best: {evaluation['best']}, reward {rewards.get(evaluation['best'])}")
