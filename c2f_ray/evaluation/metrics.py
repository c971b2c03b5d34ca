"""What responses look like, apart from their reward: length, truncation and repetition. Pure.

A share that a response cannot have (no n-gram, no line) is None and left out of means.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

# Columns that every evaluation has.
RESPONSE_METRICS = ("reward", "length", "truncated", "distinct_4", "repeated_lines")


def distinct_n(tokens: Sequence[int], n: int = 4) -> float | None:
    """Unique n-grams over all n-grams of one response's token ids (Li et al. 2016, arXiv 1510.03055, section 5).

    1 when nothing is repeated, near 0 in a loop; None when the response is shorter than ``n``.
    """
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repeated_line_share(text: str) -> float | None:
    """Share of one response's non-empty lines that occurred before in it (ours); None without any line.

    Lines are compared without the white space around them.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else None


def mean_length(responses: Sequence[Sequence[int]]) -> float:
    """Mean response length in tokens, end-of-sequence tokens included."""
    return fmean(len(tokens) for tokens in responses)


def truncated_share(finished: Sequence[bool]) -> float:
    """Share of responses that the limit cut."""
    return 1 - sum(finished) / len(finished)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None when none is."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def response_metrics(
    responses: Sequence[Sequence[int]], texts: Sequence[str], finished: Sequence[bool]
) -> dict[str, float | None]:
    """The evaluation table's columns that need no reward and no grader, over all responses of a model."""
    return {
        "length": mean_length(responses),
        "truncated": truncated_share(finished),
        "distinct_4": mean(distinct_n(tokens) for tokens in responses),
        "repeated_lines": mean(repeated_line_share(text) for text in texts),
    }
