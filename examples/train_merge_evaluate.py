"""A whole run in one script: `python examples/train_merge_evaluate.py [RECIPE] [key=value ...]`.

A script that was stopped is simply started again: training and merge go on from where they were.
"""

import sys

from c2f_ray import evaluate, load_recipe, merge, train

path, *overrides = sys.argv[1:] or ["configs/tiny.yaml"]
recipe = load_recipe(path, *overrides)
folder = train(recipe)
merge(recipe)
evaluation = evaluate(recipe)
rewards = {model["name"]: model["metrics"]["reward"] for model in evaluation["models"]}
print(f"{folder}: best of {', '.join(rewards)}: {evaluation['best']}, reward {rewards.get(evaluation['best'])}")
