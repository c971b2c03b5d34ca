"""What a recipe's fields mean: for `c2f-ray explain`, for docs/configuration.md and as a JSON schema for editors.

Everything is read from pydantic's JSON schema of `Recipe`. ``python -m c2f_ray.recipe.document`` writes the two files.
"""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from c2f_ray.errors import RecipeError
from c2f_ray.recipe.recipe import Recipe

PAGE, SCHEMA = Path("docs", "configuration.md"), Path("configs", "recipe.schema.json")
INTRODUCTION = """# Configuration

A recipe is a YAML file with the sections below; `configs/` has complete ones. `c2f-ray explain learner.optimizer.lr`
prints what this page says of one key, and `c2f-ray explain learner` lists a section. On the command line
`key=value` overrides a key. In keys, N is a position in a list, counted from 0, and NAME a name of your choice. A field
of some variants only, such as one algorithm, begins with their names in brackets. Where a model or a file is named,
`tiny:NAME` is a part of the tiny world that comes with the package.

This page is generated from the models in `c2f_ray/recipe/`.
"""
HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "boolean": "`true` or `false`", "null": "null", "object": "mapping"}

Node = dict[str, Any]  # of a JSON schema


@dataclass(frozen=True)
class Setting:
    """One field of a recipe, or a section of it."""

    key: str
    """Dotted. N stands for a position in a list, NAME for a key of a mapping."""
    type: str
    default: str
    meaning: str
    variants: tuple[str, ...] = ()
    """Algorithms, kinds or rules that have the field. Empty: all."""

    def fits(self, key: str) -> bool:
        """Returns True if a key, with positions and names in it, is of this field."""
        parts, given = self.key.split("."), key.split(".")
        return len(parts) == len(given) and all(
            part in (other, "NAME") or (part == "N" and other.isdecimal())
            for part, other in zip(parts, given, strict=True)
        )


def json_schema() -> Node:
    """Returns the JSON schema of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def settings() -> list[Setting]:
    """Returns all fields of a recipe, sections included, in the order of the models."""
    schema = json_schema()
    return list(_fields(schema["$defs"], schema))


def explain(key: str) -> str:
    """Returns type, default, meaning and variants of a field; of a section also its fields, of "" the sections.

    Raises RecipeError for an unknown key.
    """
    key = re.sub(r"^reward\.parts\.\w+\.reward\b", "reward", key)  # a term has the fields of a reward
    known = settings()
    if not key:
        return "\n".join(f"{each.key:12} {each.meaning}" for each in known if "." not in each.key)
    found = [each for each in known if each.fits(key)]
    if not found:
        near = difflib.get_close_matches(key, [each.key for each in known], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`c2f-ray explain` lists the sections"
        raise RecipeError(f"{key}: unknown key; {hint}")
    lines = []
    for each in found:
        lines += [each.key, *_details(each)]
        inside = [other for other in known if other.key.startswith(f"{each.key}.")]
        lines += [f"  {other.key}: {_of(other)}{other.type}, {other.default}" for other in inside]
    return "\n".join(lines)


def markdown() -> str:
    """Returns docs/configuration.md."""
    parts = [INTRODUCTION]
    for each in settings():
        cells = [f"`{each.key}`", each.type, each.default, f"{_of(each)}{each.meaning}"]
        if "." not in each.key:
            parts.append(
                f"\n## {each.key}\n\n{each.meaning}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
            )
        else:
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def write(root: Path) -> None:
    """Writes both files into a checkout."""
    (root / PAGE).write_text(markdown(), encoding="utf-8")
    (root / SCHEMA).write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


def _of(setting: Setting) -> str:
    return f"[{', '.join(setting.variants)}] " if setting.variants else ""


def _details(setting: Setting) -> Iterator[str]:
    yield f"  {setting.meaning}"
    yield f"  type: {setting.type}"
    yield f"  default: {setting.default}"
    if setting.variants:
        yield f"  only of: {', '.join(setting.variants)}"


def _fields(
    models: Node, model: Node, prefix: str = "", above: frozenset[str] = frozenset(), skip: str | None = None
) -> Iterator[Setting]:
    """Yields the fields of ``model`` and of the sections in them, but for those of the models ``above``."""
    for name, node in model["properties"].items():
        if name == skip:
            continue
        key = f"{prefix}{name}"
        meaning = node.get("description") or models[_name(node["$ref"])]["description"]
        yield Setting(key, _type(node), _default(name, node, model), " ".join(meaning.split()))
        for suffix, tag, variants in _sections(node):
            inside = above | set(variants.values())
            if inside == above:
                continue
            if tag is None:
                (only,) = variants.values()
                yield from _fields(models, models[only], f"{key}{suffix}.", inside)
            else:
                yield from _union(models, f"{key}{suffix}.", tag, variants, inside)


def _union(models: Node, prefix: str, tag: str, variants: dict[str, str], above: frozenset[str]) -> Iterator[Setting]:
    """Yields the fields of a section of several kinds, which ``tag`` tells apart; a field of all kinds once."""
    meaning = models[next(iter(variants.values()))]["properties"][tag]["description"]
    yield Setting(f"{prefix}{tag}", ", ".join(f"`{name}`" for name in variants), "required", meaning)
    owners: dict[Setting, list[str]] = {}
    for name, model in variants.items():
        for setting in _fields(models, models[model], prefix, above, skip=tag):
            owners.setdefault(setting, []).append(name)
    for setting, having in owners.items():
        yield setting if len(having) == len(variants) else replace(setting, variants=tuple(having))


def _sections(node: Node) -> Iterator[tuple[str, str | None, dict[str, str]]]:
    """Yields what a field leads to: a suffix of the key, the tag of a union, and models by the tag's value."""
    if "$ref" in node:
        yield "", None, {"": _name(node["$ref"])}
    elif "discriminator" in node:
        found = node["discriminator"]
        yield "", found["propertyName"], {value: _name(ref) for value, ref in found["mapping"].items()}
    for inner in node.get("anyOf", []):
        yield from _sections(inner)
    for suffix, inner in ((".N", node.get("items")), (".NAME", _values(node))):
        for deeper, tag, variants in _sections(inner) if inner else ():
            yield f"{suffix}{deeper}", tag, variants


def _values(node: Node) -> Node | None:
    """Returns the schema of a mapping's values."""
    values = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
    return values if isinstance(values, dict) else None


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _type(node: Node) -> str:
    if "$ref" in node or "discriminator" in node:
        return "section"
    if "anyOf" in node:
        return " or ".join(map(_type, node["anyOf"]))
    if "const" in node or "enum" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        least, most = node.get("minItems"), node.get("maxItems")
        count = "" if least is None else f"{least} " if least == most else f"{least} or more "
        return f"list of {count}({_type(node['items'])})"
    bounds = ", ".join(f"{sign} {node[name]}" for name, sign in BOUNDS.items() if name in node)
    pattern = f"`{node['pattern']}`" if "pattern" in node else ""
    name = node.get("type", "any")
    return " ".join(part for part in (TYPES.get(name, name), bounds, pattern) if part)


def _default(name: str, node: Node, model: Node) -> str:
    if name in model.get("required", []):
        return "required"
    if isinstance(node.get("default"), dict) and any(True for _ in _sections(node)):
        return ""  # a section, whose fields have defaults of their own
    return f"`{json.dumps(node.get('default'))}`"


if __name__ == "__main__":
    write(Path(__file__).parents[2])
