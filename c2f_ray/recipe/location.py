"""Names of models and files in a recipe.

``tiny:NAME`` is a part of the tiny world that comes with the package. It means the same in a checkout and in an
installed wheel, whatever the working directory is; every other name is kept as it is.
"""

import difflib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

PREFIX = "tiny:"
TINY_DATA = Path(__file__).parents[1] / "tiny" / "data"


def resolve(name: str) -> str:
    """Returns the absolute path that ``tiny:NAME`` stands for; any other name unchanged. Raises ValueError."""
    if not name.startswith(PREFIX):
        return name
    part = name.removeprefix(PREFIX)
    parts = sorted(path.relative_to(TINY_DATA).as_posix() for path in TINY_DATA.glob("*")) + sorted(
        path.relative_to(TINY_DATA).as_posix() for path in TINY_DATA.glob("prompts/*")
    )
    if ".." in Path(part).parts or Path(part).is_absolute() or not part or not (TINY_DATA / part).exists():
        near = difflib.get_close_matches(part, parts, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"it has {', '.join(parts)}"
        raise ValueError(f"the tiny world has no {part!r}; {hint}")
    return str(TINY_DATA / part)


def shorten(name: str) -> str:
    """Returns the ``tiny:NAME`` of a path inside the tiny world, which is the same on all machines; else the name."""
    path = Path(name)
    return f"{PREFIX}{path.relative_to(TINY_DATA).as_posix()}" if path.is_relative_to(TINY_DATA) else name


Location = Annotated[str, AfterValidator(resolve), PlainSerializer(shorten, when_used="json")]
