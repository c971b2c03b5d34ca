"""Section `rollout`: the vLLM engines and how they sample."""

from typing import Annotated, Literal

from pydantic import Field

from c2f_ray.recipe.base import Count, Positive, Section


class Rollout(Section):
    """The rollout actors, and what they sample for a step."""

    actors: Count = 1
    """Number of rollout actors, each with one vLLM engine."""
    gpus_per_actor: Annotated[int, Field(ge=0)] = 1
    """GPUs of one actor (tensor parallelism). 0 runs the engine on the CPU."""
    temperature: Positive = 1.0
    """Sampling temperature. Log probabilities, and so the losses, are always those of temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability mass that is sampled from."""
    samples_per_prompt: Count = 1
    """Responses sampled for each prompt."""
    shard_samples: Count = 32
    """Trajectories that are handed over together."""
    max_num_seqs: Count = 256
    """Sequences that one engine decodes at the same time."""
    memory: Positive = 0.9
    """Share of a GPU's memory for the engine; on the CPU, GiB of KV cache."""
    max_staleness: Literal[0, 1, 2] = 0
    """Weight versions by which samples may lag. From 1 on, a step is sampled while the one before is learned."""
    in_flight: Literal["finish", "continue"] = "finish"
    """When new weights arrive: finish running samples on the old weights, or continue them on the new ones."""
    wait_for: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a step's prompts to wait for. The next step finishes the others."""
    threads: Count | None = None
    """Threads of one engine on the CPU. null: the cores of the node, divided among the actors."""
    timeout_s: Positive = 1800
    """Seconds that the rollouts of one step may take."""
