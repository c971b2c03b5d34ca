"""The algorithms by name."""

from c2f_ray.algorithms.base import Algorithm
from c2f_ray.algorithms.group_baseline import GroupBaseline
from c2f_ray.algorithms.ppo import PPO
from c2f_ray.algorithms.rejection_sampling import RejectionSampling
from c2f_ray.algorithms.remax import ReMax
from c2f_ray.recipe import Learner

ALGORITHMS: dict[str, type[Algorithm]] = {
    "group_baseline": GroupBaseline,
    "ppo": PPO,
    "rejection_sampling": RejectionSampling,
    "remax": ReMax,
}


def algorithm_of(learner: Learner) -> type[Algorithm]:
    """Returns the algorithm that a recipe's learner section names."""
    return ALGORITHMS[learner.algorithm]
