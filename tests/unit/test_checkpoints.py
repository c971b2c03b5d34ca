"""A run's checkpoints: whole or not there."""

import json
from pathlib import Path

import pytest

from c2f_ray.driver import checkpoints
from c2f_ray.driver.checkpoints import RunState, newest_checkpoint, prune_checkpoints, write_checkpoint
from c2f_ray.driver.length import LengthState

LENGTH = LengthState(limit=17.123456789012345, step=3, reward_mean=-0.1, reward_variance=1 / 3)


def state(step: int, reward: float = 0.0) -> RunState:
    return RunState(step, 10 * step, step + 1, LENGTH, 2, reward)


def learner_files(folder: Path) -> dict[str, str]:
    (folder / "policy-rank00000-00000.safetensors").write_bytes(bytes(range(256)))
    return {"policy-rank00000-00000.safetensors": checkpoints.sha256(folder / "policy-rank00000-00000.safetensors")}


def write(run: Path, step: int, reward: float = 0.0) -> Path:
    return write_checkpoint(run, state(step, reward), {"hidden_size": 64}, learner_files)


def test_what_was_written_comes_back_to_the_last_bit(tmp_path: Path):
    write(tmp_path, 3)
    folder = write(tmp_path, 12, 1 / 7)
    found, notes = newest_checkpoint(tmp_path)
    assert found == checkpoints.Checkpoint(folder, state(12, 1 / 7), {"hidden_size": 64})
    assert folder == tmp_path / "checkpoints" / "step_000012"
    assert notes == []


@pytest.mark.parametrize("file", ["policy-rank00000-00000.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path: Path, file: str):
    before, newest = write(tmp_path, 3), write(tmp_path, 4)
    content = bytearray((newest / file).read_bytes())
    at = content.index(b'": "') + 6 if file == "manifest.json" else len(content) // 2  # in the manifest, in a digest
    content[at] ^= 1
    (newest / file).write_bytes(content)
    found, (note,) = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.folder == before
    assert note.startswith(f"{newest}: ")
    assert note.endswith("does not match its checksum")
    if file != "manifest.json":
        assert file in note


def test_a_missing_file_is_named(tmp_path: Path):
    newest = write(tmp_path, 4)
    (newest / "policy-rank00000-00000.safetensors").unlink()
    assert newest_checkpoint(tmp_path) == (None, [f"{newest}: policy-rank00000-00000.safetensors is missing"])
    (newest / "manifest.json").unlink()
    _, (note,) = newest_checkpoint(tmp_path)
    assert "manifest.json cannot be read" in note


def test_an_unfinished_checkpoint_is_passed_over_and_written_again(tmp_path: Path):
    before = write(tmp_path, 3)

    def killed(folder: Path) -> dict[str, str]:
        learner_files(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, state(4), {}, killed)
    found, notes = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.folder == before
    assert notes == [f"{tmp_path}/checkpoints/step_000004.partial: was not finished"]
    again = write(tmp_path, 4)
    assert newest_checkpoint(tmp_path)[0].folder == again  # pyrefly: ignore
    assert sorted(path.name for path in again.iterdir()) == [
        "manifest.json", "policy-rank00000-00000.safetensors", "state.json",
    ]  # fmt: skip


def test_the_last_and_the_best_are_kept(tmp_path: Path):
    for step, reward in enumerate([0.3, 0.9, 0.5, 0.1, 0.2], start=1):
        write(tmp_path, step, reward)
    (tmp_path / "checkpoints" / "step_000009.partial").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_best=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000002", "step_000004", "step_000005",
    ]  # fmt: skip
    prune_checkpoints(tmp_path, keep_last=3, keep_best=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    saved = json.loads((tmp_path / "checkpoints" / "step_000002" / "state.json").read_text())
    assert saved["run"]["mean_reward"] == 0.9
