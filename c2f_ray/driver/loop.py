"""`train`: from a recipe to a run's folder."""

import shutil
from contextlib import ExitStack, closing
from pathlib import Path

from c2f_ray.data.inputs import run_folder, with_absolute_folders
from c2f_ray.driver.check import check_train
from c2f_ray.driver.rounds import Rounds
from c2f_ray.driver.training import Training
from c2f_ray.recipe import Learner, Recipe, dump_recipe
from c2f_ray.recipe.roles import train_roles
from c2f_ray.runtime.placement import reserved
from c2f_ray.runtime.session import ray_session
from c2f_ray.runtime.trace import Timeline
from c2f_ray.watch.metrics import MetricsLog
from c2f_ray.watch.progress import Progress


def train(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Trains the coarse actor. Returns the run's folder, with `coarse/` and `metrics.jsonl` in it.

    Goes on from the newest complete checkpoint where the folder has one; `fresh` removes the folder first. Raises
    RecipeError, with nothing written, when the recipe cannot be run.
    """
    given, recipe = recipe, with_absolute_folders(recipe)
    checked = check_train(recipe, fresh)
    folder = run_folder(recipe)
    if checked.resume and checked.resume.state.step >= checked.total_steps and (folder / "coarse").is_dir():
        print(f"{folder} has {checked.resume.state.step} steps already, and {checked.total_steps} are asked for")
        return folder
    with ray_session(recipe, train_roles(recipe)), ExitStack() as stack:
        if fresh and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_recipe(given))
        timeline = stack.enter_context(Timeline(folder, checked.total_steps, details=recipe.run.trace))
        progress = stack.enter_context(Progress(checked.total_steps, timeline=timeline))
        step = checked.resume.state.step if checked.resume else 0
        log = stack.enter_context(closing(MetricsLog(folder, step, recipe.run.wandb)))
        for note in checked.notes:
            progress.note(note)
        if checked.prompts.num_dropped:
            progress.note(
                f"dropped {checked.prompts.num_dropped} prompts longer than {recipe.prompts.max_tokens} tokens"
            )
        progress.stage("starting the actors")
        placement = stack.enter_context(reserved(train_roles(recipe), recipe.cluster))
        with timeline.span("driver", 0, "starting the actors"):
            training = training_of(recipe.learner)(recipe, folder, checked, stack, timeline, placement, progress)
        del checked  # from here on the prompts' tokens are in the object store alone
        training.run(log)
    return folder


def training_of(learner: Learner) -> type[Training]:
    """Returns the loop of an algorithm: with rounds where steps end with held-out prompts."""
    return Rounds if learner.needs_heldout else Training
