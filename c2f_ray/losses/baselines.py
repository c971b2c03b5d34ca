"""Baselines: what a sample's reward is compared with. N samples; numpy, for the driver computes them."""

from typing import Literal

import numpy as np

from c2f_ray.data.trajectory import Bool, Float32, Int64


def greedy_baseline(draw: Int64, reward: Float32, greedy: Bool) -> Float32:
    """Returns, for each sample that is not greedy, the reward of the same draw's greedy rollout (arXiv 2310.10505).

    ``draw`` [N] is the number of the sample's prompt among those of the step, ``reward`` [N], ``greedy`` [N].
    """
    by_draw = dict(zip(draw[greedy].tolist(), reward[greedy].tolist(), strict=True))
    return np.array([by_draw[number] for number in draw[~greedy].tolist()], np.float32)


MIN_DEVIATION = 1e-6  # ours: where all rewards of a draw are equal the advantages are 0, not 0/0


def group_baseline(
    draw: Int64, reward: Float32, kind: Literal["leave_one_out", "mean", "mean_and_deviation"]
) -> tuple[Float32, Float32 | None]:
    """Returns each sample's baseline [N], and what its advantage is divided by [N], None for 1.

    ``draw`` [N] is the number of the sample's prompt among those of the step, and ``reward`` [N]. With r_1..r_k the
    rewards of a draw, the baseline of r_i is

    ``leave_one_out`` (RLOO, arXiv 2402.14740, section 3.3): the mean of the k - 1 others;
    ``mean`` (GRPO, arXiv 2402.03300, section 4.1.2): the mean of all k;
    ``mean_and_deviation``: that, divided by the sample deviation (of k - 1) of all k.

    A sample that is alone in its draw, since others got no reward, is its own baseline: it teaches nothing.
    """
    numbers, group = np.unique(draw, return_inverse=True)
    count, exact = np.bincount(group), reward.astype(np.float64)
    mean = (np.bincount(group, weights=exact) / count)[group]
    baseline, scale = mean, None
    if kind == "leave_one_out":
        others = np.maximum(count - 1, 1)[group]
        baseline = np.where(count[group] == 1, exact, (mean * count[group] - exact) / others)
    elif kind == "mean_and_deviation":
        squares = np.bincount(group, weights=(exact - mean) ** 2, minlength=len(numbers))
        scale = (np.sqrt(squares / np.maximum(count - 1, 1)) + MIN_DEVIATION)[group].astype(np.float32)
    return baseline.astype(np.float32), scale


def reward_spread(reward: Float32, baseline: Float32) -> float:
    """Returns the population standard deviation of ``reward - baseline`` ([N] each), in units of reward (ours).

    Like a critic's loss it falls as the baseline comes to predict the sample's reward; unlike a root mean square it
    leaves out how much better sampling is on average.
    """
    return float(np.std(np.asarray(reward, np.float64) - np.asarray(baseline, np.float64)))
