"""The root of a recipe: its sections, which agree with each other."""

from pydantic import model_validator

from c2f_ray.recipe.rules import RULES
from c2f_ray.recipe.sections import Sections


class Recipe(Sections):
    """Everything that a run is told to do."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        for rule in RULES:
            rule(self)
        return self
