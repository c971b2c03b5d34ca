"""Which fine actor is the best, and why each of the others is not. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from c2f_ray.recipe import Choose

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Choice:
    best: str | None  # None when the rule allows none
    verdicts: dict[str, str]  # of every fine actor, by its name


def choose(rule: Choose, models: Mapping[str, Metrics], fine: Sequence[str]) -> Choice:
    """Applies the rule to the models' metrics, by name. Among equals the first of `fine` is the best."""
    missed = {name: _bounds_missed(rule, models[name], models.get("instruct", {})) for name in fine}
    values = {name: models[name].get(rule.by) for name in fine}
    allowed = {name: value for name, value in values.items() if value is not None and not missed[name]}
    best = max(allowed, key=lambda name: allowed[name], default=None)
    verdicts: dict[str, str] = {}
    for name in fine:
        value = allowed.get(name)
        if name == best:
            verdicts[name] = f"chosen: {rule.by} {value:.5g}, the most of the {len(allowed)} that the rule allows"
        elif value is not None and best is not None:
            less = "less" if value < allowed[best] else "no more"
            verdicts[name] = f"lost: {rule.by} {value:.5g} is {less} than {best}'s {allowed[best]:.5g}"
        else:
            verdicts[name] = "lost: " + "; ".join(missed[name] or [f"it has no {rule.by}"])
    return Choice(best, verdicts)


def _bounds_missed(rule: Choose, metrics: Metrics, instruct: Metrics) -> list[str]:
    """One line for each bound that the metrics are beyond; a bound without a number on each side counts as missed."""
    missed: list[str] = []
    sides = [(rule.at_most_over_instruct, 1, "more"), (rule.at_least_over_instruct, -1, "less")]
    for bounds, sign, word in sides:
        for key, margin in bounds.items():
            value, of_instruct = metrics.get(key), instruct.get(key)
            if value is None or of_instruct is None:
                missed.append(f"{key} cannot be compared: {'it' if value is None else 'the instruct model'} has none")
            elif sign * value > sign * (of_instruct + margin):
                missed.append(f"{key} {value:.5g} is {word} than the instruct model's {of_instruct:.5g} {margin:+g}")
    return missed
