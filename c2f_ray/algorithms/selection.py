"""Rejection sampling: which responses of a round are learned from."""

import numpy as np

from c2f_ray.data.trajectory import Float32, Int64


def best_of_prompt(prompt_row: Int64, reward: Float32, seed: list[int]) -> Int64:
    """Index of each prompt's response with the highest reward, by prompt row; ties are broken by ``seed``.

    ``prompt_row`` [N] and ``reward`` [N] of all responses; the result has one entry for each distinct prompt row.
    """
    shuffled = np.random.default_rng(seed).permutation(len(reward))
    ranked = shuffled[np.lexsort((-reward[shuffled], prompt_row[shuffled]))]
    _, first = np.unique(prompt_row[ranked], return_index=True)
    return ranked[first]


def select(prompt_row: Int64, reward: Float32, seed: list[int], min_margin: float | None, top_fraction: float) -> Int64:
    """Indices of the responses to learn from, ascending; at least one.

    Of each prompt the best; with ``min_margin`` only where it beats the mean of its prompt's rewards by so much; and of
    these the ``top_fraction`` with the highest rewards. Where none has the margin, the one with the largest is kept.
    """
    best = best_of_prompt(prompt_row, reward, seed)
    if min_margin is not None:
        margin = np.array([reward[i] - reward[prompt_row == prompt_row[i]].mean() for i in best])
        enough = margin >= min_margin
        best = best[enough] if enough.any() else best[[int(margin.argmax())]]
    count = max(1, int(np.ceil(top_fraction * len(best))))
    return np.sort(best[np.argsort(-reward[best], kind="stable")[:count]])
