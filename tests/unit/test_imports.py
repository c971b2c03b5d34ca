"""The import law: each module belongs to a layer of docs/architecture.md and imports only from layers below its own."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "c2f_ray"
ROW = re.compile(r"^\| (\d+) \| (.+?) \|", flags=re.MULTILINE)


def layers() -> dict[str, int]:
    """Returns the layer of each folder, or module at the root, as the table in docs/architecture.md has it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return {name: int(number) for number, names in ROW.findall(text) for name in re.findall(r"`(\w+)`", names)}


def part_of(module: str) -> str:
    """Returns the folder, or the module at the root, of `c2f_ray.PART.module`."""
    return module.split(".")[1] if "." in module else "__init__"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields each imported module and its line, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "c2f_ray":
                yield from ((f"c2f_ray.{alias.name}", node.lineno) for alias in node.names)


def test_every_folder_and_module_has_a_layer():
    parts = {part_of(name) for name, _ in modules()}
    assert parts - set(layers()) == set()
    assert set(layers()) - parts == set()


def test_no_module_imports_from_a_layer_above_or_beside_its_own():
    number = layers()
    wrong = [
        f"{name}:{line} imports {module}"
        for name, tree in modules()
        for module, line in imports(tree)
        if module.startswith("c2f_ray.")
        and part_of(module) != part_of(name)
        and number[part_of(module)] >= number[part_of(name)]
    ]
    assert wrong == []


def test_modules_of_one_folder_form_no_circle():
    """Imports inside functions are allowed to break none: a circle is a design that has no order."""
    edges: dict[str, set[str]] = {}
    names = {name for name, _ in modules()}
    for name, tree in modules():
        edges[name] = {module for module, _ in imports(tree) if module in names and module != name}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])


VLLM = {"adapters", "weights"}
DEEPSPEED = {"adapters", "learner"}


@pytest.mark.parametrize(("package", "folders"), [("vllm", VLLM), ("deepspeed", DEEPSPEED)])
def test_only_named_folders_import_an_engine(package: str, folders: set[str]):
    found = {
        part_of(name)
        for name, tree in modules()
        for module, _ in imports(tree)
        if module == package or module.startswith(f"{package}.")
    }
    assert found <= folders


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray", "vllm", "deepspeed"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Blocked())
import importlib, pkgutil
for package in ("c2f_ray.recipe", "c2f_ray.plan"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_recipe_and_plan_import_neither_torch_nor_ray():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"c2f_ray.recipe.load", "c2f_ray.plan.estimate"} <= set(done.stdout.split())
