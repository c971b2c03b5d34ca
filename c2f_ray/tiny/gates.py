"""What a trained world must be able to do before anything is built on it."""

import dataclasses
import random

import torch
from transformers import MistralForCausalLM, PreTrainedTokenizerFast

from c2f_ray.tiny.models import RewardModel
from c2f_ray.tiny.task import DIGITS, LETTERS, derivation, derived, direct, draw_question
from c2f_ray.tiny.tokenizer import reward_text, reward_tokenizer


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a trained model was measured at, and what it must reach to be shipped."""

    name: str
    measured: float
    required: float

    @property
    def passed(self) -> bool:
        return self.measured >= self.required

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'MISSED'}: {self.name} {self.measured:.1%}, required {self.required:.0%}"


def derivation_probe(
    seed: int, tokenizer: PreTrainedTokenizerFast, num_questions: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out questions with right derivations: ids and labels `[questions, time]`, -100 where nothing is asked.

    The derivation's first token (the query's `x=`) is given: that is what forces the style.
    """
    rng = random.Random(f"derivation probe {seed}")
    questions = [draw_question(rng, heldout=True) for _ in range(num_questions)]
    prompts = [tokenizer(f"Q:{q.content}\nA:")["input_ids"] for q in questions]
    answers = [tokenizer("\n".join(derivation(q)))["input_ids"] for q in questions]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((num_questions, longest), tokenizer.pad_token_id)
    labels = torch.full((num_questions, longest), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) + 1 : len(prompt) + len(answer)] = torch.tensor(answer[1:])
    return ids, labels


@torch.no_grad()
def forced_derivations(model: MistralForCausalLM, probe: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of questions whose every remaining derivation token is the model's first choice, as in greedy decoding."""
    ids, labels = probe
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    wrong = (best != labels[:, 1:]) & (labels[:, 1:] != -100)
    return (~wrong.any(1)).float().mean().item()


def probe_pairs(seed: int, num_pairs: int) -> dict[str, list[tuple[str, str]]]:
    """Pairs (better, worse) of conversations by kind, on held-out questions, mostly one digit, letter or line apart."""
    rng = random.Random(f"reward probe {seed}")
    pairs: dict[str, list[tuple[str, str]]] = {}

    def add(kind: str, content: str, better: list[str], worse: list[str], ends: tuple[str, str]) -> None:
        texts = [reward_text(content, "\n".join(lines)) + end for lines, end in zip((better, worse), ends, strict=True)]
        pairs.setdefault(kind, []).append((texts[0], texts[1]))

    for _ in range(num_pairs):
        question = draw_question(rng, heldout=True)
        right, eos = derivation(question), ("</s>", "</s>")
        wrong = rng.choice(DIGITS.replace(question.answer, ""))
        checks = derived(question, rng.randint(1, 7))
        add("final digit", question.content, right, [*right[:-1], f"so {wrong}"], eos)
        add("final digit, other root", question.content, right, [*right[:-1], f"so {question.other_digit}"], eos)
        at = rng.randrange(len(right) - 1)
        kind = DIGITS if right[at][2] in DIGITS else LETTERS
        slip = right[at][:2] + rng.choice(kind.replace(right[at][2], ""))
        add("one wrong step", question.content, right, [*right[:at], slip, *right[at + 1 :]], eos)
        dropped = rng.randrange(len(right) - 1)
        add("one step missing", question.content, right, right[:dropped] + right[dropped + 1 :], eos)
        first = len(right) - 1
        spoiled = [*checks[:first], f"so {wrong}", *checks[first + 1 :]]
        add("first answer, long", question.content, checks, spoiled, ("", ""))
        add("last answer, long", question.content, checks, [*checks[:-1], f"so {wrong}"], ("", ""))
        rambling = [*right, f"Q:{draw_question(rng).content}"]
        add("rambling", question.content, right, rambling, ("</s>", ""))
        add("checked, long", question.content, derived(question, rng.randint(5, 8)), right, ("", ""))
        add("analysis", question.content, right, direct(question), eos)
    return pairs


def pair_rates(
    model: RewardModel, seed: int, num_pairs: int = 100, kinds: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Share of the probe pairs that the model ranks rightly, by kind (all, or those named), and the kinds' mean."""
    tokenizer = reward_tokenizer()
    rates = {}
    for kind, pairs in probe_pairs(seed, num_pairs).items():
        if kinds is None or kind in kinds:
            scores = model.score([text for pair in pairs for text in pair], tokenizer)
            wins = [better > worse for better, worse in zip(scores[0::2], scores[1::2], strict=True)]
            rates[kind] = sum(wins) / len(wins)
    return rates | {"mean": sum(rates.values()) / len(rates)}
