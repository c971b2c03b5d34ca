"""Functions of the user's own, named in a recipe as `module:name`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from c2f_ray.errors import RecipeError


def load_function(key: str, path: str) -> Callable[..., Any]:
    """Imports the function, from the working directory too. Raises RecipeError naming the dotted ``key``."""
    module, name = path.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the module, which may raise anything
        raise RecipeError(f"{key}: {path}: {error}") from None
    if not callable(function):
        raise RecipeError(f"{key}: {path}: {name} is no function, but {type(function).__name__}")
    return function
