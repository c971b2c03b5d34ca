"""Which ratio each tensor gets."""

import pytest

from c2f_ray.errors import RecipeError
from c2f_ray.merging.ratios import layer_of, schedule_ratios
from c2f_ray.recipe import RatioSchedule

TENSORS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
TENSORS += [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.experts.7.w1")]


def ratios(*rules: dict) -> dict[str, float]:
    schedule = RatioSchedule.model_validate({"name": "x", "ratio": 0.1, "rules": list(rules)})
    return schedule_ratios("merge.schedules.0", schedule, TENSORS)


def by_layer(found: dict[str, float], part: str) -> list[float]:
    return [found[f"model.layers.{i}.{part}.weight"] for i in range(5)]


def test_a_tensors_layer_is_the_first_number_in_its_name():
    assert layer_of("model.layers.12.mlp.experts.7.w1.weight") == 12
    assert layer_of("transformer.h.3.attn.c_attn.weight") == 3
    assert layer_of("model.norm.weight") is None


def test_a_range_of_layers_is_inclusive_and_the_rest_has_the_schedules_ratio():
    found = ratios({"layers": [1, 3], "ratio": 0.6})
    assert by_layer(found, "self_attn.q_proj") == by_layer(found, "mlp.experts.7.w1") == [0.1, 0.6, 0.6, 0.6, 0.1]
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == 0.1


def test_a_gradient_is_linear_between_its_values_and_leaves_what_is_in_no_layer():
    found = ratios({"gradient": [0.2, 1.0, 0.0]})
    assert by_layer(found, "self_attn.q_proj") == pytest.approx([0.2, 0.6, 1.0, 0.5, 0.0])
    assert found["model.norm.weight"] == 0.1
    assert by_layer(ratios({"layers": [2, 4], "gradient": [0.0, 1.0]}), "mlp.experts.7.w1") == [0.1, 0.1, 0.0, 0.5, 1.0]


def test_the_first_rule_that_fits_counts():
    found = ratios(
        {"modules": "*.self_attn.*", "layers": [0, 1], "ratio": 0.0},
        {"gradient": [0.4, 0.8]},
        {"modules": "lm_head.*", "ratio": 1.0},
    )
    assert by_layer(found, "self_attn.q_proj") == pytest.approx([0.0, 0.0, 0.6, 0.7, 0.8])
    assert by_layer(found, "mlp.experts.7.w1") == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    assert (found["lm_head.weight"], found["model.embed_tokens.weight"]) == (1.0, 0.1)


def test_rules_that_fit_nothing_are_refused():
    with pytest.raises(RecipeError) as refusal:
        ratios(
            {"layers": [3, 5], "ratio": 0.5},
            {"modules": "self_attn", "ratio": 0.5},
            {"gradient": [0.0, 1.0]},
            {"modules": "*w1*", "ratio": 0.2},
        )
    shown = f"modules is a shell pattern for whole names, such as {TENSORS[6]}"
    assert refusal.value.problems == (
        "merge.schedules.0.rules.0.layers: [3, 5]: the model has 5 layers, counted from 0; at most 4",
        f"merge.schedules.0.rules.1: fits no tensor that the rules before it leave; {shown}",
        f"merge.schedules.0.rules.3: fits no tensor that the rules before it leave; {shown}",
    )
