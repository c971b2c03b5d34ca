"""Recipes: what a run is told to do. Importable without torch."""

from c2f_ray.recipe.load import dump_recipe, load_recipe
from c2f_ray.recipe.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe"]
