"""UltraRM against its model card: the two examples there, and the differences that the card prints for them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.errors import RecipeError
from c2f_ray.reward.ultrarm import load_ultrarm

TOLERANCE = 0.02  # the card's numbers are float32's; half precision is this near to them


@dataclass(frozen=True)
class CardExample:
    chosen: str
    rejected: str
    difference: float  # of the rewards, as the card prints it


def card_examples(card: Path) -> list[CardExample]:
    """The examples of openbmb/UltraRM-13b's README.md: a line of JSON each, and `Output N: DIFFERENCE`."""
    if not card.is_file():
        raise RecipeError(f"{card}: not there; download the model card with the weights, the examples are in it")
    text = card.read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in re.findall(r'^\s*(\{"chosen":.*\})', text, re.MULTILINE)]
    outputs = [float(value) for value in re.findall(r"^# Output \d+: (\S+)", text, re.MULTILINE)]
    if not pairs or len(pairs) != len(outputs):
        raise RecipeError(
            f"{card}: {len(pairs)} examples and {len(outputs)} outputs in it, where UltraRM's has two each"
        )
    return [CardExample(pair["chosen"], pair["rejected"], out) for pair, out in zip(pairs, outputs, strict=True)]


@torch.inference_mode()
def check_card(folder: Path) -> list[tuple[CardExample, float]]:
    """Each example with the difference that the checkpoint in `folder` gives, in float32; on a GPU if there is one."""
    examples = card_examples(folder / "README.md")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = load_ultrarm(str(folder), torch.float32)
    model = model.to(device)
    tokenizer = load_tokenizer(str(folder))

    def reward(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=device)
        return model(ids, torch.ones_like(ids)).item()

    return [(example, reward(example.chosen) - reward(example.rejected)) for example in examples]
