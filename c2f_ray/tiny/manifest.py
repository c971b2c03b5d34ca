"""The manifest of the tiny world: what its files are, and how they were made.

Imports neither torch nor transformers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 hex digest of each file below `folder` but the manifest, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the digests of the folder's files beside `facts`: settings, machine and what the gates measured."""
    manifest = {"format": FORMAT, **facts, "files": digests(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def differences(folder: Path) -> list[str]:
    """Returns one line for each file that is missing, changed or not in the folder's manifest."""
    stored = json.loads((folder / MANIFEST).read_text())["files"]
    actual = digests(folder)
    return [
        f"{name}: " + ("missing" if name not in actual else "not in the manifest" if name not in stored else "changed")
        for name in sorted({**stored, **actual})
        if stored.get(name) != actual.get(name)
    ]
