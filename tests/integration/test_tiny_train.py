"""The maintainers' tool that trains the tiny world: same bytes twice, and all is kept when a gate is missed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from c2f_ray.recipe.location import TINY_DATA
from c2f_ray.tiny import train
from c2f_ray.tiny.manifest import MANIFEST, differences, digests
from c2f_ray.tiny.settings import Settings

# A handful of steps: the models learn nothing, so every gate that asks for learning is missed.
SMALL = replace(
    Settings(),
    base_min_steps=5, base_max_steps=5, base_cooldown_steps=2, instruct_steps=2, reward_min_steps=2,
    reward_max_steps=2, reward_long_steps=1, reward_prompts=4, pair_reference_steps=2, pair_policy_steps=2,
    pair_rows=4, train_prompts=8, heldout_prompts=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """The tool sets torch's threads and determinism for its process; other tests share this one."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_two_runs_write_the_same_bytes_in_the_layout_that_ships(tmp_path: Path):
    for name in ("one", "two"):
        train.train_world(tmp_path / name, SMALL)
        assert differences(tmp_path / name) == []
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one").keys() == digests(TINY_DATA).keys()


def test_what_was_trained_is_kept_when_a_gate_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [str(tmp_path / "world"), "--seed", "3", "--threads", "1"]
    with pytest.raises(SystemExit) as end:
        train.main(words, SMALL)
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "MISSED: base: forced derivations right to the last digit 0.0%, required 95%" in said
    assert "gates missed; try another --seed" in said
    manifest = json.loads((tmp_path / "world" / MANIFEST).read_text())
    assert (manifest["settings"]["seed"], manifest["settings"]["num_threads"]) == (3, 1)
    assert (tmp_path / "world" / "reward" / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as refused:
        train.main(words, SMALL)
    assert refused.value.code == 2
    assert "is not empty: give a new folder" in capsys.readouterr().err
