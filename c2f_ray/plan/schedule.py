"""Seconds of a step by role, from the rates of data sheets: not yet compared with a run on GPUs."""

from dataclasses import dataclass
from math import ceil

from c2f_ray.plan.clusters import CPU, Gpu
from c2f_ray.plan.memory import WIDTH, Engine, trainable
from c2f_ray.plan.model import ModelShape
from c2f_ray.recipe import ModelReward, Recipe
from c2f_ray.recipe.roles import Scorer, scorers

# Shares of a data sheet's peak that kernels reach, and what is not on it. Of ours, on the careful side of what is
# published for models of this size; arXiv 2205.05198 reports 42% to 56% of an A100's peak in training.
TRAINING = 0.40  # of the peak FLOPs
FORWARD = 0.50
DECODING = 0.60  # of the memory's bandwidth
NODE_LINK = 200e9  # bytes a second between the GPUs of one node
HOST_MEMORY = 10e9  # bytes a second that AdamW touches on one CPU thread, where the optimizer is offloaded
ADAM_BYTES = 28  # of a parameter that AdamW reads and writes

ASSUMPTIONS = (
    "every prompt and every response is as long as its limit allows",
    f"kernels reach {TRAINING:.0%} of the GPU's bfloat16 peak in training, {FORWARD:.0%} in forward passes, and "
    f"{DECODING:.0%} of its memory's bandwidth in decoding (shares of ours; peaks from the data sheets)",
    f"ranks of one node exchange {NODE_LINK / 1e9:.0f} GB/s; an offloaded AdamW touches {HOST_MEMORY / 1e9:.0f} GB/s",
    "rewards are computed while rollouts still run; learning follows, beside the next step's rollouts where "
    "rollout.max_staleness is 1, and then the weights cross the network once",
)


@dataclass(frozen=True)
class Models:
    policy: ModelShape
    critic: ModelShape | None
    reward: list[ModelShape | None]  # as `scorers` has them; a function is None


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts."""

    rollout: float
    scores: list[float]  # as `scorers` has them; they work side by side
    learner: float
    weights: float
    pipelined: bool  # the next step is sampled beside the learner

    @property
    def reward(self) -> float:
        return max(self.scores)

    @property
    def seconds(self) -> float:
        sampling = max(self.rollout, self.reward)
        return self.weights + (max(sampling, self.learner) if self.pipelined else sampling + self.learner)


def num_rollouts(recipe: Recipe) -> int:
    """Of one step; rejection sampling samples its held-out prompts too."""
    per_prompt = recipe.rollout.samples_per_prompt + recipe.learner.needs_greedy
    heldout = 0
    if recipe.learner.needs_heldout and recipe.evaluate:
        heldout = recipe.evaluate.num_prompts or 0
    return (recipe.prompts.per_step + heldout) * per_prompt


def step(recipe: Recipe, models: Models, gpu: Gpu, engine: Engine, response: int, network: float, node: int) -> Step:
    """One step whose responses have ``response`` tokens.

    ``gpu``: of each actor, CPU where the recipe asks for none; ``network``: bytes a second between nodes; ``node``:
    GPUs of a node, among which learner ranks are quicker.
    """
    prompt = recipe.prompts.max_tokens
    return Step(
        rollout=_rollout(recipe, models.policy, gpu, engine, prompt, response),
        scores=[
            _scores(recipe, scorer, shape, gpu, prompt + response)
            for scorer, shape in zip(scorers(recipe), models.reward, strict=True)
        ],
        learner=_learner(recipe, models, gpu, prompt, response, NODE_LINK if recipe.learner.ranks <= node else network),
        weights=transfer_bytes(recipe, models.policy) / network,
        pipelined=recipe.pipelined,
    )


def transfer_bytes(recipe: Recipe, policy: ModelShape) -> float:
    return WIDTH[recipe.policy.dtype] * policy.parameters


def _rollout(recipe: Recipe, policy: ModelShape, gpu: Gpu, engine: Engine, prompt: int, response: int) -> float:
    """A decoding step reads all weights and all keys and values; or multiplies, where that takes longer."""
    rollout, width = recipe.rollout, WIDTH[recipe.policy.dtype]
    share = ceil(num_rollouts(recipe) / rollout.actors)
    together = max(1, min(share, engine.in_flight))
    read = width * (policy.parameters + together * (prompt + response / 2) * policy.kv_elements)
    multiply = policy.forward_flops(together, prompt + response, head=True)
    gpus = max(1, rollout.gpus_per_actor)
    token = max(read / (gpus * gpu.bandwidth * DECODING), multiply / (gpus * gpu.flops * FORWARD))
    prefill = policy.forward_flops(share * prompt, prompt, head=False) / (gpus * gpu.flops * FORWARD)
    return share / together * response * token + prefill


def _scores(recipe: Recipe, scorer: Scorer, shape: ModelShape | None, gpu: Gpu, length: int) -> float:
    """What is a function, or runs without a GPU where others have one, has no known rate, and counts as none."""
    reward = scorer.reward
    if not isinstance(reward, ModelReward) or shape is None or (reward.gpus == 0 and gpu is not CPU):
        return 0.0
    read = min(length, reward.max_tokens)
    flops = shape.forward_flops(num_rollouts(recipe) * read, read, head=reward.generates)
    return flops / (reward.workers * max(1, reward.gpus_per_worker) * gpu.flops * FORWARD)


def _learner(recipe: Recipe, models: Models, gpu: Gpu, prompt: int, response: int, link: float) -> float:
    learner, width = recipe.learner, WIDTH[recipe.policy.dtype]
    samples = learner.learned_samples(recipe.prompts.per_step, recipe.rollout.samples_per_prompt)
    length = prompt + response
    micro_batches = ceil(samples * length / (learner.ranks * learner.tokens_per_microbatch))
    seconds = 0.0
    for passes in learner.passes(samples):
        head = passes.model == "policy"  # a critic has no output layer
        shape = models.policy if head or models.critic is None else models.critic
        learning = trainable(shape, learner.lora) if head else shape.trunk
        forwards, epochs = passes.forwards, passes.backwards
        one = shape.forward_flops(samples * length, length, head=False)
        one += 2 * shape.embedding * samples * response * head
        # A backward is two forwards: of the inputs' gradient and, where all weights learn, of theirs.
        trained = (3 if learner.lora is None or not head else 2) + learner.gradient_checkpointing
        flops = one * (forwards + epochs * trained)
        seconds += flops / (learner.ranks * gpu.flops * TRAINING)
        share = learning / learner.ranks
        touched = HOST_MEMORY if learner.offload != "none" else gpu.bandwidth
        seconds += passes.optimizer_steps * ADAM_BYTES * share / touched
        if learner.ranks > 1:  # gradients are summed in every micro-batch; ZeRO-3 gathers the weights for each pass
            gathers = (forwards + 2 * epochs) * shape.parameters if learner.zero_stage == 3 else 0
            seconds += micro_batches * width * (epochs * learning + gathers) / link
    return seconds
