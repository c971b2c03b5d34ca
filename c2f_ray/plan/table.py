"""An estimate as tables for the terminal."""

from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from c2f_ray.plan.clusters import actors_of
from c2f_ray.plan.estimate import Estimate, Role
from c2f_ray.plan.memory import GIB
from c2f_ray.plan.schedule import ASSUMPTIONS, num_rollouts
from c2f_ray.recipe.roles import scorers

MIB = 2**20


def format_estimate(found: Estimate, network: float) -> RenderableType:
    parts: list[RenderableType] = [_models(found), _memory(found), _placement(found)]
    if found.steps:
        parts.append(_schedule(found))
    return Group(*parts, *_lines(found, network))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _models(found: Estimate) -> Table:
    table = _table("models", "role", "parameters", "of them used by a token", "KV cache of a token")
    models = found.models
    rows = [("policy", models.policy)] + ([("critic", models.critic)] if models.critic else [])
    rows += [(scorer.title, shape) for scorer, shape in zip(scorers(found.recipe), models.reward, strict=True) if shape]
    for role, shape in rows:
        kv = f"{2 * shape.kv_elements / 1024:.0f} KiB" if role == "policy" else ""
        count = shape.trunk if role == "critic" else shape.parameters
        table.add_row(role, _count(count), _count(shape.active + shape.embedding), kv)
    return table


def _memory(found: Estimate) -> Table:
    gpu = found.nodes.gpu
    on, unit = f"GPU ({gpu.name}, {gpu.memory / GIB:.1f} GiB), GiB", GIB
    if not found.steps:
        on, unit = "process (CPU), MiB", MIB

    def told(size: float | None) -> str:
        return "" if size is None else f"{size / unit:.1f}"

    table = _table(f"memory of one {on}", "what", *(role.name for role in found.roles))
    names = dict.fromkeys(name for role in found.roles for name in role.memory.gpu)
    for name in names:
        table.add_row(name, *(told(role.memory.gpu.get(name)) for role in found.roles))
    table.add_section()
    table.add_row("together", *(told(role.memory.total or None) for role in found.roles))
    if found.steps:
        table.add_row("may take", *(told(role.room if role.gpus else None) for role in found.roles))
        table.add_row("fits", *(_fits(role) for role in found.roles))
    for name in dict.fromkeys(name for role in found.roles for name in role.memory.host):
        table.add_row(f"in CPU memory: {name}", *(told(role.memory.host.get(name)) for role in found.roles))
    return table


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e8 else f"{number / 1e6:.3g} M"


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def told_seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 99.5 else f"{seconds:.2g}"


def _fits(role: Role) -> str:
    if role.gpus == 0:
        return ""
    return "yes" if role.memory.total <= role.room else "no"


def _placement(found: Estimate) -> Table:
    table = _table("placement", "node", "GPUs", "actors")
    table.columns[2].justify = "left"
    for number, (node, actors) in enumerate(zip(found.nodes.nodes, found.placed, strict=True)):
        counts = Counter((actor.role, actor.gpus) for actor in actors)
        told = [f"{count} {role} ({gpus} GPU)" if gpus else f"{count} {role}" for (role, gpus), count in counts.items()]
        if number == 0:
            told.insert(0, "driver")
        table.add_row(node.kind, f"{sum(actor.gpus for actor in actors)} of {node.gpus}", ", ".join(told))
    return table


def _schedule(found: Estimate) -> Table:
    table = _table("one step, seconds", "response limit", *(f"{limit} tokens" for limit in found.steps))
    steps = list(found.steps.values())
    for name in ("rollout", "reward", "learner", "weights"):
        table.add_row(name, *(told_seconds(getattr(step, name)) for step in steps))
    table.add_section()
    table.add_row("step", *(told_seconds(step.seconds) for step in steps))
    table.add_row("sequences in an engine's KV cache", *(str(engine.in_flight) for engine in found.engines.values()))
    return table


def _lines(found: Estimate, network: float) -> Iterator[str]:
    recipe = found.recipe
    yield (
        f"weight transfer: {_size(found.transfer)} in buckets of {recipe.weights.bucket_mib} MiB, "
        f"{found.transfer / network:.2g} s at {network / 1e9:.3g} GB/s"
    )
    yield f"disk: {_size(sum(found.disk.values()))}: " + ", ".join(
        f"{name} {_size(size)}" for name, size in found.disk.items()
    )
    if found.steps:
        yield from _costs(found)
        yield "assumed:"
        yield from (f"- {assumption}" for assumption in ASSUMPTIONS)
    else:
        yield "seconds are estimated for GPUs alone; on CPUs each process needs memory for its libraries as well"
    for node, actors in zip(found.nodes.nodes, found.placed, strict=True):
        if node.gpus and not any(actor.gpus for actor in actors):
            yield f"note: {node.gpus} GPUs of a node ({node.kind}) have nothing to do"


def _costs(found: Estimate) -> Iterator[str]:
    longest = found.steps[max(found.steps)]
    shortest = found.steps[min(found.steps)]
    slowest = max(("rollout", "reward", "learner"), key=lambda name: getattr(longest, name))
    yield f"bottleneck: {slowest}, {getattr(longest, slowest) / longest.seconds:.0%} of a step"
    if found.split:
        counts, seconds = found.split
        told = " ".join(f"{key}={count}" for key, count in counts.items())
        gain = 1 - seconds / longest.seconds
        if sum(actor.gpus for actor in actors_of(found.recipe)) > found.nodes.gpus:
            yield f"{found.nodes.gpus} GPUs have room for {told}: {told_seconds(seconds)} s a step"
        elif gain > 0.02:
            yield f"a quicker split of as many GPUs: {told}: {told_seconds(seconds)} s a step, {gain:.0%} less"
        else:
            yield "no other split of as many GPUs makes a step 2% quicker"
    if len(found.steps) > 1:
        yield (
            f"growing the limit from {min(found.steps)} to {max(found.steps)} tokens makes a step "
            f"{longest.seconds / shortest.seconds:.1f} times as long"
        )
    if found.total_steps:
        hours = [found.total_steps * step.seconds / 3600 for step in (shortest, longest)]
        span = f"{hours[0]:.3g} to {hours[1]:.3g}" if len(found.steps) > 1 else f"{hours[1]:.3g}"
        yield f"run: {found.total_steps} steps of {num_rollouts(found.recipe)} rollouts, {span} hours at the most"
    in_flight = found.engines[max(found.engines)].in_flight
    share = -(-num_rollouts(found.recipe) // found.recipe.rollout.actors)
    if in_flight < min(share, found.recipe.rollout.max_num_seqs):
        yield f"note: an engine has room for {in_flight} of its {share} sequences at the longest limit; the rest wait"
