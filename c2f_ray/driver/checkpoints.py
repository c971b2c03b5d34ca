"""A run's checkpoints: each complete or not there, verified before use, older ones removed only after a newer one.

``checkpoints/step_000012/`` holds the learner's files, ``state.json``, and ``manifest.json`` with every file's SHA-256.
It is written as ``step_000012.partial`` and renamed.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from c2f_ray.data.atomic import remove_folder, replacing, sha256, sync
from c2f_ray.driver.length import LengthState

MANIFEST, STATE = "manifest.json", "state.json"


@dataclass
class RunState:
    """All that the next step depends on, beside what the learner keeps."""

    step: int  # steps done
    position: int  # prompts drawn since the start
    weight_version: int
    length: LengthState
    bad_updates: int = 0  # in a row, up to now
    mean_reward: float = 0.0  # of the last step; of rejection sampling the held-out reward
    carried: list[list[int]] = field(default_factory=list)  # (row, epoch) of prompts left to the next step
    heldout: list[float] = field(default_factory=list)  # of rejection sampling: before the first round, and after each


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: RunState
    policy: dict[str, Any]  # configuration of the policy's architecture


def write_checkpoint(
    run: Path, state: RunState, policy: dict[str, Any], write: Callable[[Path], dict[str, str]]
) -> Path:
    """Adds a checkpoint to the run's folder; returns its folder.

    ``write`` puts the learner's files into a folder and returns their SHA-256 hex digests by file name.
    """
    folder = run / "checkpoints" / f"step_{state.step:06d}"
    with replacing(folder, durable=True) as partial:  # there may be one, of a run that was continued from before it
        partial.mkdir()
        digests = write(partial)
        _write(partial / STATE, {"run": asdict(state), "policy": policy})
        _write(partial / MANIFEST, {"files": digests | {STATE: sha256(partial / STATE)}})
    return folder


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    passed_over = [f"{folder}: was not finished" for folder in sorted(run.glob("checkpoints/step_*.partial"))]
    for folder in reversed(_complete(run)):
        if problem := _problem(folder):
            passed_over.append(f"{folder}: {problem}")
            continue
        saved = json.loads((folder / STATE).read_text())
        state = saved["run"] | {"length": LengthState(**saved["run"]["length"])}
        return Checkpoint(folder, RunState(**state), saved["policy"]), passed_over
    return None, passed_over


def prune_checkpoints(run: Path, keep_last: int, keep_best: int) -> None:
    """Removes all but the last ones and, among the others, those with the highest mean reward."""
    for partial in run.glob("checkpoints/*.partial"):
        shutil.rmtree(partial)
    older = _complete(run)[:-keep_last]
    rewards = {folder: json.loads((folder / STATE).read_text())["run"]["mean_reward"] for folder in older}
    for folder in sorted(older, key=lambda folder: rewards[folder])[: len(older) - keep_best]:
        remove_folder(folder)


def _complete(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("checkpoints/step_*") if folder.suffix != ".partial")


def _problem(folder: Path) -> str | None:
    try:
        digests = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if missing := [name for name in digests if not (folder / name).is_file()]:
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor() as threads:
        found = dict(zip(digests, threads.map(lambda name: sha256(folder / name), digests), strict=True))
    wrong = [name for name, digest in digests.items() if found[name] != digest]
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
    sync(path)
