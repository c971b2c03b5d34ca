"""Recipes: what a run is told to do. Importable without torch and without Ray."""

from c2f_ray.recipe.algorithms import (
    Critic,
    GroupBaselineLearner,
    Learner,
    PPOLearner,
    ReinforceLearner,
    RejectionSamplingLearner,
    ReMaxLearner,
)
from c2f_ray.recipe.base import Dtype, Section
from c2f_ray.recipe.data import Policy, Prompts
from c2f_ray.recipe.evaluate import (
    RECORD,
    Choose,
    EndpointJudge,
    Evaluate,
    GeneralTask,
    LmEval,
    MTBench,
    Perplexity,
    RewardJudge,
    WinRate,
)
from c2f_ray.recipe.learner import LearnerBase, Lora, Optimizer, Passes
from c2f_ray.recipe.length import FixedLength, Length, LinearLength, LogisticLength
from c2f_ray.recipe.load import dump_recipe, load_recipe
from c2f_ray.recipe.merge import MERGE_METHODS_WITH, Merge, MergeMethod, RatioRule, RatioSchedule
from c2f_ray.recipe.recipe import Recipe
from c2f_ray.recipe.reward import (
    FunctionReward,
    LogRatioReward,
    ModelReward,
    OneReward,
    Reward,
    SumReward,
    UltraRMReward,
    WeightedReward,
)
from c2f_ray.recipe.rollout import Rollout
from c2f_ray.recipe.run import Checkpoints, Cluster, Run, Weights
