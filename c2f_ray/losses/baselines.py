"""Baselines: what a sample's reward is compared with. N samples; numpy, for the driver computes them."""

import numpy as np

from c2f_ray.data.trajectory import Bool, Float32, Int64


def greedy_baseline(draw: Int64, reward: Float32, greedy: Bool) -> Float32:
    """Returns, for each sample that is not greedy, the reward of the same draw's greedy rollout (arXiv 2310.10505).

    ``draw`` [N] is the number of the sample's prompt among those of the step, ``reward`` [N], ``greedy`` [N].
    """
    by_draw = dict(zip(draw[greedy].tolist(), reward[greedy].tolist(), strict=True))
    return np.array([by_draw[number] for number in draw[~greedy].tolist()], np.float32)


def reward_spread(reward: Float32, baseline: Float32) -> float:
    """Returns the population standard deviation of ``reward - baseline`` ([N] each), in units of reward (ours).

    Like a critic's loss it falls as the baseline comes to predict the sample's reward; unlike a root mean square it
    leaves out how much better sampling is on average.
    """
    return float(np.std(np.asarray(reward, np.float64) - np.asarray(baseline, np.float64)))
