"""The prompts and texts of the tiny world: distinct questions of two splits, and held-out answers."""

import json
import random
from pathlib import Path

from c2f_ray.tiny.settings import Settings
from c2f_ray.tiny.task import derived, draw_question


def write_prompts(folder: Path, settings: Settings) -> None:
    """Writes `train.jsonl` and `heldout.jsonl`, distinct questions of the two splits, and `texts.jsonl`."""
    folder.mkdir(parents=True)
    rng = random.Random(f"texts {settings.seed}")
    texts = [(draw_question(rng, heldout=True), rng.randint(0, 2)) for _ in range(settings.heldout_prompts)]
    lines = [f"Q:{question.content}\nA:" + "\n".join(derived(question, checks)) for question, checks in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for split, count in (("train", settings.train_prompts), ("heldout", settings.heldout_prompts)):
        rng = random.Random(f"prompts {split} {settings.seed}")
        questions: dict[str, dict[str, object]] = {}
        while len(questions) < count:
            question = draw_question(rng, heldout=split == "heldout")
            if question.content in questions:
                continue
            questions[question.content] = {
                "id": f"{split}-{len(questions):05d}",
                "messages": [{"role": "user", "content": question.content}],
                "answer": question.answer,
                "depth": question.depth,
            }
        lines = [json.dumps(record) + "\n" for record in questions.values()]
        (folder / f"{split}.jsonl").write_text("".join(lines))
