"""lm-eval itself on a tiny model, offline, with a folder of tasks of our own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from c2f_ray import load_recipe
from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.trajectory import Ragged
from c2f_ray.errors import C2FError, RecipeError
from c2f_ray.evaluation.check import Candidate
from c2f_ray.evaluation.job import general_tasks
from c2f_ray.evaluation.tasks import check_tasks, task_metrics
from c2f_ray.recipe import GeneralTask, LmEval

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
YAML = """
task: digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "Q:{{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
fewshot_delimiter: "\\n"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def questions(world: Path, tmp_path: Path) -> list[dict]:
    """Questions with the two digits of each as choices, and `tasks`, the folder of the task."""
    rows = []
    for line in (world / "prompts" / "heldout.jsonl").read_text().splitlines()[:32]:
        prompt = json.loads(line)
        question = prompt["messages"][0]["content"]
        digits = sorted({letter for letter in question if letter.isdigit()})
        rows.append({"question": question, "choices": digits, "label": digits.index(prompt["answer"])})
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "digits.yaml").write_text(YAML.format(data=folder / "digits.jsonl"))
    return rows


def accuracy(folder: Path, rows: list[dict], few_shot: int) -> float:
    """The share of questions whose right digit is the more likely one after the first few of the others, answered."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    for row in rows:
        others = [other for other in rows if other is not row][:few_shot]
        shots = "".join(f"Q:{other['question']}\nA:{other['choices'][other['label']]}\n" for other in others)
        prompt = tokenizer(f"{shots}Q:{row['question']}\nA:", return_tensors="pt")["input_ids"]
        digits = [tokenizer(f"A:{digit}")["input_ids"][-1] for digit in row["choices"]]
        with torch.no_grad():
            logits = model(prompt).logits[0, -1]
        right += int(logits[digits].argmax()) == row["label"]
    return right / len(rows)


def test_results_are_those_of_a_plain_forward_and_are_not_computed_twice(
    world: Path, cluster: None, tmp_path: Path, questions: list[dict]
):
    tasks = [GeneralTask(name="digits")]
    settings = LmEval(tasks=tasks, include_path=str(tmp_path / "tasks"), timeout_s=1800)
    check_tasks(settings)
    prompts = PromptSet([], [], [], Ragged.from_rows([], int), 0)
    candidates = [Candidate("instruct", str(world / "instruct"), "", prompts, fine=False)]
    recipe = load_recipe(CONFIG)
    ((name, metrics),) = general_tasks(recipe, settings, candidates, tmp_path / "run")
    own = accuracy(world / "instruct", questions, few_shot=0)
    assert (name, metrics) == ("instruct", {"tasks": own, "task/digits": own})
    assert 0 < own < 1
    (path,) = (tmp_path / "run" / "evaluation" / "tasks").glob("instruct.*/digits-0.json")
    kept = json.loads(path.read_text())
    assert (kept["n-shot"], kept["n-samples"]["digits"]["effective"]) == ({"digits": 0}, 32)
    kept["results"]["digits"]["acc,none"] = 0.125
    path.write_text(json.dumps(kept))
    ((_, metrics),) = general_tasks(recipe, settings, candidates, tmp_path / "run")
    assert metrics == {"tasks": 0.125, "task/digits": 0.125}, "it is read, not computed again"

    # In the same process, so that nothing is imported again: one example before each question.
    ((_, metrics),) = general_tasks(
        recipe, settings.model_copy(update={"tasks": [GeneralTask(name="digits", few_shot=1)]}), candidates, tmp_path
    )
    assert metrics["task/digits"] == accuracy(world / "instruct", questions, few_shot=1)


def test_what_is_missing_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"evaluate.lm_eval.include_path: nowhere: no such folder"):
        check_tasks(LmEval(tasks=[GeneralTask(name="digits")], include_path="nowhere"))
    settings = LmEval(tasks=[GeneralTask(name="digits", metric="acc_norm")], include_path=str(tmp_path / "tasks"))
    found = {"digits": {"alias": "digits", "acc,none": 0.5, "acc_stderr,none": 0.1}}
    with pytest.raises(C2FError, match="digits: no metric 'acc_norm'; it has acc, acc_stderr"):
        task_metrics(settings, found)
