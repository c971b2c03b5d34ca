"""The merge methods against numbers worked by hand, and the rounding of their results."""

from math import cos, pi

import numpy as np
import pytest
import torch

from c2f_ray.merging.methods import (
    ROLES,
    Settings,
    Whole,
    copied_role,
    cosine,
    dare,
    drop_factors,
    drop_generator,
    interpolate,
    look_at_whole,
    magnitude_threshold,
    merge_piece,
    residue,
    slerp,
    task_arithmetic,
    ties,
    widen,
)

INSTRUCT = torch.tensor([1.0, -2.0, 3.0, 0.0])
COARSE = torch.tensor([2.0, 1.5, -2.0, 6.0])
BASE = torch.tensor([0.0, 1.0, 1.0, 2.0])
DELTA_I = torch.tensor([1.0, -3.0, 2.0, -2.0])
DELTA_C = torch.tensor([2.0, 0.5, -3.0, 4.0])
MODELS = {"instruct": INSTRUCT, "coarse": COARSE, "base": BASE}


def scratch(count: int) -> dict[str, torch.Tensor]:
    return {name: torch.empty(count) for name in (*MODELS, "delta_i", "delta_c")}


def test_residue_and_interpolate():
    assert residue(INSTRUCT, DELTA_C, 0.5).tolist() == [2.0, -1.75, 1.5, 2.0]
    assert interpolate(INSTRUCT, COARSE, 0.25).tolist() == [1.25, -1.125, 1.75, 1.5]
    # They differ by ratio * (instruct - base).
    difference = residue(INSTRUCT, DELTA_C, 0.5) - interpolate(INSTRUCT, COARSE, 0.5)
    assert difference.tolist() == [0.5, -1.5, 1.0, -1.0]


def test_task_arithmetic_scales_all_that_is_added_to_the_base():
    # base + 2 * [1 + 1, -3 + 0.25, 2 - 1.5, -2 + 2]
    assert task_arithmetic(BASE, DELTA_I, DELTA_C, 0.5, 2.0).tolist() == [4.0, -4.5, 2.0, 2.0]
    assert torch.equal(task_arithmetic(BASE, DELTA_I, DELTA_C, 0.5, 1.0), residue(INSTRUCT, DELTA_C, 0.5))


def test_slerp_follows_the_arc_and_is_linear_between_parallel_vectors():
    # A right angle, a third of the way: sin 60 degrees of the one, sin 30 degrees of the other.
    right = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 1 / 3, cosine=0.0)
    assert right.tolist() == pytest.approx([0.75**0.5, 1.0], abs=1e-7)
    # 60 degrees, halfway: both weights are sin 30 / sin 60 degrees.
    wide = slerp(torch.tensor([2.0]), torch.tensor([4.0]), 0.5, cosine=cos(pi / 3))
    assert wide.tolist() == pytest.approx([6 * 0.5 / 0.75**0.5], abs=1e-6)
    assert slerp(INSTRUCT, 2 * INSTRUCT, 0.25, cosine=0.9996).tolist() == (1.25 * INSTRUCT).tolist()
    assert slerp(INSTRUCT, -INSTRUCT, 0.25, cosine=-0.9996).tolist() == (0.5 * INSTRUCT).tolist()


def test_ties_elects_a_sign_and_takes_the_mean_of_those_that_have_it():
    # Elected by [1 + 1, -3 + 0.25, 2 - 1.5, -2 + 2], where 0 counts as plus. Means: (1 + 0.5 * 2) / 1.5 of both; -3 and
    # 2 of instruct alone; 4 of coarse alone.
    whole = ties(BASE, DELTA_I, DELTA_C, 0.5, 1.0, Whole())
    assert whole.tolist() == pytest.approx([4 / 3, -2.0, 3.0, 6.0], abs=1e-6)
    # The coarse delta loses its two least elements: 1 of instruct alone in the first place.
    trimmed = ties(BASE, DELTA_I, DELTA_C, 0.5, 1.0, Whole(coarse_threshold=3.0))
    assert trimmed.tolist() == [1.0, -2.0, 3.0, 6.0]
    scaled = ties(BASE, DELTA_I, DELTA_C, 0.5, 0.5, Whole(instruct_threshold=3.0, coarse_threshold=5.0))
    assert scaled.tolist() == [0.0, -0.5, 1.0, 2.0]  # only -3 is left: half of it is added to the base


def test_dare_rescales_what_it_keeps():
    factors = {"instruct": torch.ones(4), "coarse": torch.tensor([0.0, 2.0, 0.0, 2.0])}
    # instruct + 0.5 * [0, 2 * 0.5, 0, 2 * 4]
    assert dare(BASE, DELTA_I, DELTA_C, 0.5, 1.0, factors).tolist() == [1.0, -1.5, 3.0, 4.0]
    ones = dict.fromkeys(("instruct", "coarse"), torch.ones(4))
    assert torch.equal(dare(BASE, DELTA_I, DELTA_C, 0.5, 2.0, ones), task_arithmetic(BASE, DELTA_I, DELTA_C, 0.5, 2.0))


def test_what_dare_drops_depends_on_seed_tensor_and_role_and_not_on_the_pieces():
    factors = drop_factors(drop_generator(1, "a", "coarse"), 100_000, 0.25)
    assert sorted(set(factors.tolist())) == [0.0, 4.0]
    assert factors.mean().item() == pytest.approx(1.0, abs=0.03)  # its standard deviation is 0.0055
    generator = drop_generator(1, "a", "coarse")
    pieces = torch.cat([drop_factors(generator, count, 0.25) for count in (1, 7, 50_001, 49_991)])
    assert torch.equal(factors, pieces)
    for other in [(2, "a", "coarse"), (1, "b", "coarse"), (1, "a", "instruct")]:
        same = (drop_factors(drop_generator(*other), 100_000, 0.25) == factors).float().mean().item()
        assert same == pytest.approx(0.25**2 + 0.75**2, abs=0.01)


def test_the_threshold_is_the_magnitude_of_that_rank():
    values = torch.tensor([3.0, -5.0, 0.5, 2.0, -2.0, 0.0, 1e-40])

    def pieces():
        return iter(values.split(3))

    assert [magnitude_threshold(pieces, keep) for keep in range(8)] == pytest.approx(
        [5.0, 5.0, 3.0, 2.0, 2.0, 0.5, 1e-40, 0.0], abs=1e-45
    )
    many = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ranked = many.abs().sort(descending=True).values
    for keep in (1, 17, 5_000, 9_999):
        assert magnitude_threshold(lambda: iter(many.split(999)), keep) == ranked[keep - 1].item()


def test_cosine_of_pieces():
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, 1.0])
    assert cosine([(a[:1], b[:1]), (a[1:], b[1:])]) == pytest.approx(4 / (3 * 5**0.5), abs=1e-12)
    assert cosine([(a, a)]) == 1.0
    assert cosine([(a, torch.zeros(3))]) == 1.0


def test_ratio_0_is_the_instruct_model_and_ratio_1_of_an_interpolation_the_coarse_one():
    keep = Settings(scale=1.0, instruct_density=1.0)
    assert [copied_role(method, 0.0, keep) for method in ROLES] == ["instruct"] * 6
    assert [copied_role(method, 1.0, keep) for method in ROLES] == [None, "coarse", None, "coarse", None, None]
    assert {copied_role(method, 0.5, keep) for method in ROLES} == {None}
    # Not where the settings change what is added to the base.
    scaled, trimmed = Settings(scale=0.5), Settings(instruct_density=0.5)
    assert [m for m in ROLES if copied_role(m, 0.0, scaled) is None] == ["task_arithmetic", "ties", "dare"]
    assert [m for m in ROLES if copied_role(m, 0.0, trimmed) is None] == ["ties", "dare"]


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even, by integer arithmetic."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("method", ["residue", "interpolate", "task_arithmetic", "slerp"])
def test_bf16_is_rounded_once_from_float32(method):
    generator = torch.Generator().manual_seed(0)
    inputs = {role: torch.randn(20_001, generator=generator).to(torch.bfloat16) for role in MODELS}
    i, c, b = (inputs[role].float().numpy() for role in MODELS)
    r, rest, scale = np.float32(0.3), np.float32(0.7), np.float32(1.1)
    wide = widen(inputs, scratch(20_001))
    settings = Settings(scale=1.1)
    whole = look_at_whole(lambda: iter([wide]), 20_001, {method}, settings)
    angle = np.arccos(
        np.float64(i.astype(np.float64) @ c)
        / np.linalg.norm(i.astype(np.float64))
        / np.linalg.norm(c.astype(np.float64))
    )
    expected = {
        "residue": i + r * (c - b),
        "interpolate": rest * i + r * c,
        "task_arithmetic": b + scale * ((i - b) + r * (c - b)),
        "slerp": np.float32(np.sin(0.7 * angle) / np.sin(angle)) * i
        + np.float32(np.sin(0.3 * angle) / np.sin(angle)) * c,
    }[method]
    fine = merge_piece(method, wide, 0.3, settings, whole, {}).to(torch.bfloat16)
    assert np.array_equal(fine.view(torch.uint16).numpy(), round_to_bf16(expected))


@pytest.mark.parametrize("method", ROLES)
def test_inputs_are_not_changed(method):
    wide = widen(MODELS, scratch(9))
    assert (wide["delta_i"].tolist(), wide["delta_c"].tolist()) == (DELTA_I.tolist(), DELTA_C.tolist())
    before = {role: values.clone() for role, values in wide.items()}
    factors = {"instruct": torch.full((4,), 2.0), "coarse": torch.full((4,), 2.0)}
    merge_piece(method, wide, 0.3, Settings(), Whole(0.5, 1.5, 1.5), factors)
    assert all(torch.equal(values, before[role]) for role, values in wide.items())
