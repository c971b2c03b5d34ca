"""Reads a recipe from YAML, applies overrides, and turns every problem into one line that names the remedy."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from c2f_ray.errors import RecipeError
from c2f_ray.recipe.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-7` as text and keeps the last of two equal keys in silence; this one does neither."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, *overrides: str) -> Recipe:
    """Reads the YAML file `path` and applies `overrides` such as ``learner.optimizer.lr=5e-7``.

    `path` may also be the name of a recipe that comes with the package, such as ``tiny``.

    Raises RecipeError with all problems found, each with its dotted key or its file and line.
    """
    path = Path(path)
    if not path.is_file() and path.name == str(path) and (shipped := shipped_recipes() / f"{path}.yaml").is_file():
        path = shipped
    if not path.is_file():
        if "=" in str(path):
            raise RecipeError(f"{path}: the recipe comes first, then key=value")
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        names = difflib.get_close_matches(path.stem, [p.stem for p in shipped_recipes().glob("*.yaml")], n=1)
        meant = str(path.parent / near[0]) if near else names[0] if names and path.name == str(path) else None
        hint = f"; did you mean {meant}?" if meant else f" in {Path.cwd()}"
        raise RecipeError(f"{path}: no such recipe{hint}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as run: and learner:")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(*(_describe(detail) for detail in error.errors())) from None


def shipped_recipes() -> Path:
    """Returns the folder of the recipes that come with the package: beside it in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; `load_recipe` reads it back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML. Raises RecipeError with ``where`` and the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a control character; a date that does not exist
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override}: an override is written key=value, such as learner.optimizer.lr=5e-7")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise RecipeError(f"{key}: {section} is a value, not a section")
    tree[last] = parse_yaml(value, where=key)


def _describe(detail: ErrorDetails) -> str:
    """One line for one of pydantic's errors. Its location holds the tag of each union passed; ours does not."""
    keys: list[str] = []
    model: Any = Recipe
    siblings: dict[str, type[BaseModel]] = {}  # of `model`, where it is one of a union's
    for part in detail["loc"]:
        if isinstance(part, str) and part not in _fields(model) and part in _variants(model):
            siblings = _variants(model)
            model = siblings[part]
            continue
        keys.append(str(part))
        if detail["type"] != "extra_forbidden" or part in _fields(model):
            model, siblings = _fields(model).get(str(part), object), {}
    dotted = ".".join(keys) or "recipe"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _fields(model), n=1, cutoff=0.5)
        parent = ".".join(keys[:-1])
        if owners := [tag for tag, sibling in siblings.items() if keys[-1] in _fields(sibling)]:
            return f"{dotted}: a setting of {' and '.join(owners)} only; leave it out, or change what {parent} is"
        if near:
            return f"{dotted}: unknown key; did you mean {'.'.join([*keys[:-1], near[0]])}?"
        return f"{dotted}: unknown key; {parent or 'a recipe'} takes {', '.join(_fields(model))}"
    if detail["type"] == "missing":
        return f"{dotted}: missing; it has no default"
    if detail["type"] == "union_tag_not_found":
        context = detail.get("ctx", {})
        return f"{dotted}.{context['discriminator'].strip(chr(39))}: missing; one of {', '.join(_variants(model))}"
    if detail["type"] == "union_tag_invalid":
        context = detail["ctx"]
        name = context["discriminator"].strip("'")
        near = difflib.get_close_matches(context["tag"], list(_variants(model)), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{dotted}.{name}: {context['tag']!r} is not one of {', '.join(_variants(model))}{hint}"
    rule = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f"{value!r}: "
    return f"{dotted}: {shown}{rule[0].lower()}{rule[1:]}"


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    """Tag to model of a discriminated union (the tag is its members' one single-valued Literal), else empty."""
    return {
        tags[0]: member
        for member in get_args(annotation)
        if isinstance(member, type) and issubclass(member, BaseModel)
        for name in ("rule", "kind", "algorithm")
        if name in member.model_fields and (tags := get_args(member.model_fields[name].annotation))
    }


def _fields(annotation: Any) -> dict[str, Any]:
    """Name to annotation of the fields of a model, or of an optional model; empty for anything else."""
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if member is not annotation and _variants(annotation):
                return {}
            return {name: field.annotation for name, field in member.model_fields.items()}
    return {}
