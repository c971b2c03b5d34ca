"""What a reward reads, as text and as its own model's tokens, and how a score that is none is told."""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from c2f_ray.data.prompts import Messages
from c2f_ray.recipe import ModelReward

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    messages: Messages  # the prompt
    response: str
    finished: bool  # it ended by itself, and was not cut by the limit
    record: dict[str, Any]  # the prompt's other fields, such as its answer


@dataclass(frozen=True)
class Encoded:
    """A conversation in the reward model's tokens."""

    ids: list[int]
    response_start: int  # index of the response's first token


def appends_eos(reward: ModelReward, sample: Sample) -> bool:
    return reward.append_eos == "always" or (reward.append_eos == "finished" and sample.finished)


def cut_front(ids: list[int], response_start: int, max_tokens: int, bos: int | None) -> Encoded:
    """Returns the conversation's last ``max_tokens`` tokens; a beginning-of-sequence token at its start is kept."""
    lost = max(0, len(ids) - max_tokens)
    if lost and ids[0] == bos and max_tokens > 1:
        return Encoded([ids[0], *ids[lost + 1 :]], max(1, response_start - lost))
    return Encoded(ids[lost:], max(0, response_start - lost))


def score_each(score: Callable[[list[T]], Sequence[Any]], items: list[T]) -> list[float | str]:
    """For each item its finite score, or the cause why it has none.

    Where `score` raises, or returns another number of scores, each item is scored alone: the others keep theirs.
    """
    try:
        found = score(items)
        if not isinstance(found, list | tuple | np.ndarray) or len(found) != len(items):
            said = f"{len(found)} scores" if isinstance(found, list | tuple | np.ndarray) else repr(found)[:100]
            raise TypeError(f"returned {said} for {len(items)} samples, and not a list of as many numbers")
    except Exception as error:  # a user's function, or an engine, may raise anything
        if len(items) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [score_each(score, [item])[0] for item in items]
    numeric = [isinstance(value, numbers.Real) and bool(np.isfinite(float(value))) for value in found]
    return [
        float(value) if good else f"the score is {value!r}, not a finite number"
        for value, good in zip(found, numeric, strict=True)
    ]
