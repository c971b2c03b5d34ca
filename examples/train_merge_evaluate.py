"""A whole run in one script: `python examples/train_merge_evaluate.py [RECIPE] [key=value ...]`.

A script that was stopped is simply started again: training and merge go on from where they were.
"""

import sys

from c2f_ray import evaluate, load_recipe, merge, train

recipe = load_recipe(*sys.argv[1:] or ["configs/tiny.yaml"])  # and key=value ...
folder = train(recipe)
merge(recipe)
print(f"{folder}: the best is {evaluate(recipe)['best']}")
