"""c2f_ray: coarse-to-fine RL for language models on Ray.

``load_recipe`` needs no torch; the three jobs import their engines when they are first named.
"""

from typing import Any

from c2f_ray.recipe import Recipe, load_recipe

__all__ = ["Recipe", "evaluate", "load_recipe", "merge", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from c2f_ray.driver.loop import train

        return train
    if name == "merge":
        from c2f_ray.merging.job import merge

        return merge
    if name == "evaluate":
        from c2f_ray.evaluation.job import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
