"""Rules between sections of a recipe. Each is a function that raises ValueError with key, value, rule and remedy."""

from collections.abc import Callable

from c2f_ray.recipe.algorithms import PPOLearner
from c2f_ray.recipe.reward import ModelReward, UltraRMReward
from c2f_ray.recipe.sections import Sections


def same_device(recipe: Sections) -> None:
    """Refuses engines and learner on different devices: weights go over gloo between CPUs, over NCCL between GPUs."""
    if (recipe.rollout.gpus_per_actor == 0) != (recipe.learner.gpus_per_rank == 0):
        raise ValueError(
            "rollout.gpus_per_actor and learner.gpus_per_rank: both 0 (CPU, weights over gloo) or both more "
            f"(GPU, weights over NCCL); not {recipe.rollout.gpus_per_actor} and {recipe.learner.gpus_per_rank}"
        )


def memory_is_a_share_on_gpus(recipe: Sections) -> None:
    """Refuses GiB on a GPU, where the engine's memory is a share."""
    if recipe.rollout.gpus_per_actor > 0 and recipe.rollout.memory > 1:
        raise ValueError(
            f"rollout.memory: on a GPU it is a share of its memory, at most 1; not {recipe.rollout.memory}"
        )


def enough_samples(recipe: Sections) -> None:
    """Refuses too few samples for algorithms that compare the samples of one prompt."""
    least, given = recipe.learner.min_samples_per_prompt, recipe.rollout.samples_per_prompt
    if given < least:
        raise ValueError(
            f"rollout.samples_per_prompt: {given}: {recipe.learner.algorithm} compares a prompt's "
            f"samples; give {least} or more"
        )


def held_out_prompts_are_given(recipe: Sections) -> None:
    """Refuses algorithms that measure each round on held-out prompts without these."""
    if recipe.learner.needs_heldout and recipe.evaluate is None:
        raise ValueError(f"evaluate: missing; {recipe.learner.algorithm} measures each round on evaluate.prompts")


def length_rule_has_a_guide(recipe: Sections) -> None:
    """Refuses the logistic rule where there is neither a critic nor a baseline to observe."""
    if recipe.length.needs_guide and not recipe.learner.guides_length:
        raise ValueError(
            f"length.rule: {recipe.length.rule} observes a critic or a baseline, and {recipe.learner.algorithm} has "
            "none; use fixed or linear"
        )


def stale_samples_are_corrected(recipe: Sections) -> None:
    """Refuses to sample ahead of the learner without importance weights, or where the algorithm does not allow it."""
    staleness, learner = recipe.rollout.max_staleness, recipe.learner
    if recipe.pipelined and not learner.can_pipeline:
        raise ValueError(
            f"rollout.max_staleness: {staleness} with {learner.algorithm} has no meaning: "
            "each round samples with the last one's weights; leave it out"
        )
    if recipe.pipelined and getattr(learner, "importance_clip", None) is None:
        raise ValueError(
            f"rollout.max_staleness: {staleness} makes samples off-policy; "
            "set learner.importance_clip (2 is usual), which corrects for that"
        )


def interruption_needs_staleness(recipe: Sections) -> None:
    """Refuses to continue or carry over samples where none may be of older weights."""
    rollout = recipe.rollout
    if rollout.in_flight == "continue" and rollout.max_staleness == 0:
        raise ValueError(
            "rollout.in_flight: continue without rollout.max_staleness has no meaning: nothing is sampled as the "
            "learner learns; set rollout.max_staleness to 1"
        )
    if rollout.wait_for < 1 and rollout.max_staleness < 2:
        raise ValueError(
            f"rollout.wait_for: {rollout.wait_for:g} leaves samples to the next step, where their first "
            "tokens may be two weight versions old; set rollout.max_staleness to 2"
        )


def deterministic_runs_wait(recipe: Sections) -> None:
    """Refuses to interrupt samples in deterministic runs: how far they are depends on time."""
    rollout = recipe.rollout
    if recipe.run.deterministic and (rollout.in_flight == "continue" or rollout.wait_for < 1):
        raise ValueError(
            "run.deterministic: true with rollout.in_flight: continue or rollout.wait_for below 1 is not possible: "
            "how far a sample was when new weights came depends on time"
        )


def bfloat16_needs_zero(recipe: Sections) -> None:
    """Refuses bfloat16 without ZeRO, whose optimizer in DeepSpeed counts one step too many."""
    if recipe.policy.dtype == "bfloat16" and recipe.learner.zero_stage == 0:
        raise ValueError(
            "learner.zero_stage: 0 with policy.dtype bfloat16 is not offered: DeepSpeed's optimizer for it counts "
            "one step too many; use 1, which on one rank is the same"
        )


def critic_has_a_start(recipe: Sections) -> None:
    """Refuses a critic that starts from a reward model where there is none."""
    starts_from_reward = isinstance(recipe.learner, PPOLearner) and recipe.learner.critic.model == "reward"
    if starts_from_reward and not isinstance(recipe.reward, UltraRMReward):
        raise ValueError(
            "learner.critic.model: 'reward' needs a reward model to start from, and reward.kind is "
            f"{recipe.reward.kind!r}; use 'policy' or a folder"
        )


def inner_timeouts_end_first(recipe: Sections) -> None:
    """Refuses a timeout that is longer than the one around it: its cause would never be reported.

    Two waits are inside others: a weight transfer in a call of the learner, and the filling of a batch in a call of a
    reward worker. The other timeouts follow each other (`cluster.start_timeout_s`, then `rollout.timeout_s`, then
    `reward.timeout_s`), belong to other commands (`merge`, `evaluate`, `evaluate.lm_eval`, `evaluate.judge`), or the
    code derives what is inside them, such as a quarter of `rollout.timeout_s` to fetch a partial sample.
    """
    inner, outer = recipe.weights.timeout_s, recipe.learner.timeout_s
    if inner > outer:
        raise ValueError(
            f"weights.timeout_s: {inner:g} is longer than learner.timeout_s ({outer:g}), inside which a transfer runs; "
            "lower weights.timeout_s, or raise learner.timeout_s"
        )
    for name, part in recipe.reward.named_parts().items():
        settings, key = part.reward, recipe.reward.part_key(name)
        if isinstance(settings, ModelReward) and settings.max_wait_s >= settings.timeout_s:
            raise ValueError(
                f"{key}.max_wait_s: {settings.max_wait_s:g} is not shorter than {key}.timeout_s "
                f"({settings.timeout_s:g}), inside which a batch fills up; lower {key}.max_wait_s"
            )


RULES: tuple[Callable[[Sections], None], ...] = (
    same_device,
    memory_is_a_share_on_gpus,
    enough_samples,
    held_out_prompts_are_given,
    length_rule_has_a_guide,
    stale_samples_are_corrected,
    interruption_needs_staleness,
    deterministic_runs_wait,
    bfloat16_needs_zero,
    critic_has_a_start,
    inner_timeouts_end_first,
)
