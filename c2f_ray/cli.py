"""The command line. Each command is one of the Python functions, and imports it only when it is called."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from c2f_ray.errors import C2FError, RecipeError, StoppedError
from c2f_ray.recipe import Recipe, load_recipe
from c2f_ray.runtime.signals import Stopping


class _Commands(typer.core.TyperGroup):
    """Ends every command with StoppedError when a signal comes, wherever it is."""

    def invoke(self, ctx: Any) -> Any:
        with Stopping():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Train a coarse actor by RL, merge it into fine actors, evaluate them all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a job's log is read as plain text
)
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name, such as tiny.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as learner.optimizer.lr=5e-7.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run's folder first, if there is one.")]


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Run the whole chain on the CPU with the tiny models in the package: train, merge, evaluate, report."""
    from c2f_ray.tiny.demo import run_demo

    run_demo(overrides or [])


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train the coarse actor."""
    loaded = _load(recipe, overrides)
    from c2f_ray.driver.loop import train

    folder = train(loaded, fresh=fresh)
    print(f"coarse actor: {folder / 'coarse'}")


@app.command()
def merge(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Merge the coarse actor with the instruct model into fine actors."""
    loaded = _load(recipe, overrides)
    from c2f_ray.merging.job import merge

    for folder in merge(loaded):
        print(f"fine actor: {folder}")


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate base, instruct, coarse and every fine actor on held-out prompts."""
    loaded = _load(recipe, overrides)
    from c2f_ray.evaluation.job import evaluate
    from c2f_ray.watch.progress import table_console
    from c2f_ray.watch.report import format_table

    table_console().print(format_table(evaluate(loaded)))


@app.command()
def score(
    recipe: RecipePath,
    source: Annotated[Path, typer.Option("--in", help="A .jsonl or .parquet file of prompts with responses or pairs.")],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl file; one that is there is gone on with.")],
    overrides: Overrides = None,
) -> None:
    """Score a file of responses, or of preference pairs, by the recipe's reward."""
    loaded = _load(recipe, overrides)
    from c2f_ray.reward.score_file import score

    found = score(loaded, source, out)
    print(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))


@app.command("convert-reward")
def convert_reward(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A folder with UltraRM's config.json and .bin files.")],
) -> None:
    """Write a published UltraRM's .bin files as safetensors, beside them."""
    from c2f_ray.reward.convert import convert_reward

    for path in convert_reward(folder):
        print(path)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of ray up, a KubeRay manifest, or a Slurm script.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs, in place of a file; else as many as needed.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Beside --gpus.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="Type of GPU, such as A100-80G or H100.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="In place of its type's memory.")] = None,
    network_gbits: Annotated[float, typer.Option(min=0.1, help="Network between nodes, Gbit/s.")] = 100,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run the real driver on fake actors that take these seconds.")
    ] = False,
) -> None:
    """Say what a recipe will need: memory, placement, seconds, disk. Needs neither a GPU nor the models' weights."""
    loaded = _load(recipe, overrides)
    from c2f_ray.plan.clusters import chosen_nodes
    from c2f_ray.plan.estimate import estimate
    from c2f_ray.plan.table import format_estimate
    from c2f_ray.watch.progress import table_console

    network = network_gbits * 1e9 / 8
    nodes = chosen_nodes(loaded, cluster, gpus, gpus_per_node, gpu, gpu_memory_gib)
    found = estimate(loaded, nodes, network)
    console = table_console()
    console.print(format_estimate(found, network))
    for problem in found.problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    if found.problems:
        sys.exit(1)
    if simulate:
        from c2f_ray.simulate.run import format_simulation
        from c2f_ray.simulate.run import simulate as run_simulation

        console.print(format_simulation(run_simulation(loaded, found, network)))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="Such as learner.optimizer.lr, or a section.")] = "",
) -> None:
    """Print type, default and meaning of a recipe's field, or the fields of a section."""
    from c2f_ray.recipe.document import explain

    print(explain(key))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Checks what it names as well.")] = None,
    overrides: Overrides = None,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="On every node of the Ray cluster.")] = False,
    reward: Annotated[
        Literal["ultrarm"] | None, typer.Option("--reward", help="Instead, check the reward model in this folder.")
    ] = None,
) -> None:
    """Check versions, GPUs, Ray, disks, models and the network; exit code 1 where something must be mended."""
    if reward is not None:
        from c2f_ray.reward.card import TOLERANCE, check_card

        if recipe is None:
            raise RecipeError("--reward: name the model's folder too, as in: c2f-ray doctor --reward ultrarm PATH")
        checked = check_card(recipe)
        for number, (example, found) in enumerate(checked, start=1):
            good = abs(found - example.difference) <= TOLERANCE
            level = "ok" if good else "failure"
            print(f"{level}: example {number}: chosen minus rejected {found:.4f}, the card: {example.difference:.4f}")
        sys.exit(int(any(abs(found - example.difference) > TOLERANCE for example, found in checked)))
    loaded = _load(recipe, overrides) if recipe else None
    from c2f_ray.doctor.cluster import diagnose

    failed = False
    for where, findings in diagnose(loaded, all_nodes=all_nodes):
        print(f"{where}:", flush=True)
        for finding in findings:
            print(f"  {finding}", flush=True)
            failed = failed or finding.level == "failure"
    sys.exit(int(failed))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")],
    beside: Annotated[list[Path] | None, typer.Argument(metavar="[OTHER ...]", help="Runs to show beside it.")] = None,
) -> None:
    """Write the run's report.html."""
    for folder in (run, *(beside or [])):
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"{folder}: not a run's folder: it has no recipe.yaml")
        if folder != run and not (folder / "metrics.jsonl").is_file():
            raise RecipeError(f"{folder}: has no metrics.jsonl yet, so there is nothing to show of it")
    from c2f_ray.watch.report import write_report

    print(f"report: {write_report(run, beside or [])}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")],
    once: Annotated[bool, typer.Option("--once", help="One frame, for a log.")] = False,
) -> None:
    """Show how a run goes, from its files: stages, reward, lengths, throughput, roles, what went wrong."""
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: not a run's folder: it has no recipe.yaml")
    from c2f_ray.watch.dashboard import watch

    watch(run, once=once)


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    return load_recipe(recipe, *(overrides or []))


def main() -> None:
    """Runs the command line. Bad input ends with exit code 2, other known errors with 1, each in a few plain lines.

    A command that a signal stopped ends with 128 + its number: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP.
    """
    try:
        app()
    except RecipeError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as error:
        print(error)
        sys.exit(128 + error.signal)
    except C2FError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
