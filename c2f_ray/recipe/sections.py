"""The sections of a recipe, each on its own; `rules` says how they must agree."""

from c2f_ray.recipe.algorithms import Learner
from c2f_ray.recipe.base import Section
from c2f_ray.recipe.data import Policy, Prompts
from c2f_ray.recipe.evaluate import Evaluate
from c2f_ray.recipe.length import Length
from c2f_ray.recipe.merge import Merge
from c2f_ray.recipe.reward import Reward
from c2f_ray.recipe.rollout import Rollout
from c2f_ray.recipe.run import Checkpoints, Cluster, Run, Weights


class Sections(Section):
    """Everything that a run is told to do."""

    run: Run
    """What the run is called, when it ends, and what it records."""
    cluster: Cluster = Cluster()
    """How actors are placed, started and replaced."""
    policy: Policy
    """The model that is trained."""
    prompts: Prompts
    """The prompts to train on."""
    length: Length
    """The response limit of every step, by its `rule`."""
    rollout: Rollout
    """The rollout actors, and what they sample for a step."""
    reward: Reward
    """What scores a response, by its `kind`."""
    learner: Learner
    """What is learned from the samples, by its `algorithm`."""
    weights: Weights = Weights()
    """How the learner's weights reach the rollout actors."""
    checkpoints: Checkpoints = Checkpoints()
    """When checkpoints are written and which are kept."""
    merge: Merge | None = None
    """How fine actors are made. null: none are."""
    evaluate: Evaluate | None = None
    """What base, instruct, coarse and fine actors are measured by. null: no evaluation."""

    @property
    def critic_model(self) -> str | None:
        """Returns the folder or hub name that the critic starts from; None without a critic."""
        return self.learner.critic_model(self.policy.model, self.reward)

    @property
    def pipelined(self) -> bool:
        """Returns True where the next step is sampled while the learner works."""
        return self.rollout.max_staleness > 0
