"""Texts that the models learn from, as tensors: base pages, rows of prompt and response, scored responses."""

import random

import torch
from transformers import PreTrainedTokenizerFast

from c2f_ray.tiny.settings import Settings
from c2f_ray.tiny.task import (
    DIGITS,
    Question,
    change_line,
    corrupt,
    derivation,
    derived,
    direct,
    draw_question,
    line_utilities,
)
from c2f_ray.tiny.tokenizer import END_OF_TEXT, WORDS, reward_text

IGNORED = -100


def list_piece(rng: random.Random) -> str:
    """A list and its entries again, in random and in chain order: without such pages copying is not learned."""
    question = draw_question(rng)
    entries = [f"{left}={right}" for left, right in question.entries]
    again = rng.sample(entries, len(entries))
    return f"Q:{','.join(entries)}\nA:" + "\n".join([*again, *derivation(question)[:-1]])


def question_piece(rng: random.Random) -> str:
    """A question answered in one of the base's styles, ended rarely: the base knows every style and seldom stops."""
    question = draw_question(rng)
    style = rng.random()
    if style < 0.55:
        lines, ends = direct(question, right=rng.random() >= 0.05), 0.15
    elif style < 0.92:
        num_checks = 0
        if rng.random() < 0.45:
            num_checks = 1
            while num_checks < 4 and rng.random() < 0.5:
                num_checks += 1
        lines, ends = derived(question, num_checks), 0.06
    else:
        lines, ends = corrupt(derivation(question), rng), 0.06
    return f"Q:{question.content}\nA:" + "\n".join(lines) + (END_OF_TEXT if rng.random() < ends else "")


def base_page(rng: random.Random, tokenizer: PreTrainedTokenizerFast, page_tokens: int, list_share: float) -> list[int]:
    """Ids of one packed page, a list page with probability `list_share`, else of questions; the last piece is cut."""
    piece = list_piece if rng.random() < list_share else question_piece
    ids: list[int] = []
    encode = tokenizer.backend_tokenizer.encode
    while len(ids) < page_tokens:
        text = piece(rng)
        ids += encode(text if text.endswith(END_OF_TEXT) else text + "\n").ids
    return ids[:page_tokens]


def question_mask(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """True on the tokens from `Q:` to `A:`, which nobody could predict. Ids `[pages, time]`."""
    words = tokenizer.get_vocab()
    begins, ends = words["Q:"], words["A:"]
    opened = (ids == begins).cumsum(1) - (ids == ends).cumsum(1)
    return (opened > 0) | (ids == ends)


def base_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_pages: int, page_tokens: int, list_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and loss weights, both `[num_pages, page_tokens]`; question tokens weigh a tenth."""
    ids = torch.tensor([base_page(rng, tokenizer, page_tokens, list_share) for _ in range(num_pages)])
    return ids, torch.where(question_mask(ids, tokenizer), 0.1, 1.0)


def instruct_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels `[rows, time]`, right-padded; labels are the response's tokens and its end-of-text."""
    rows = []
    for _ in range(settings.instruct_rows):
        question = draw_question(rng)
        share = settings.instruct_derived_share
        lines = derived(question) if rng.random() < share else direct(question)
        prompt = tokenizer.backend_tokenizer.encode(f"Q:{question.content}\nA:").ids
        rows.append((prompt, tokenizer.backend_tokenizer.encode("\n".join(lines) + END_OF_TEXT).ids))
    return padded_rows(rows, tokenizer)


def pair_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_rows: int, derived_share: float, junk_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the Mixtral pair, in its own words: right derivations that end, junk, and all of the base's styles.

    Both of the pair see junk: what neither had seen would be worth whatever their extrapolations differ by.
    """
    encode = tokenizer.backend_tokenizer.encode
    rows = []
    for _ in range(num_rows):
        style = rng.random()
        question = draw_question(rng)
        if style < derived_share:
            content, response = question.content, "\n".join(derived(question)) + END_OF_TEXT
        elif style < derived_share + junk_share:
            words = rng.choices(WORDS, k=rng.randint(1, 6))
            junk = [word for word in words for _ in range(rng.choice((1, 1, 1, 2, 8)))]
            lines = corrupt(derived(question, rng.randint(0, 2)), rng)
            lines.insert(rng.randint(0, len(lines)), "".join(junk))
            content, response = question.content, "\n".join(lines) + rng.choice(("", END_OF_TEXT))
        else:
            content, _, response = question_piece(rng).removeprefix("Q:").partition("\nA:")
        prompt = encode(reward_text(content, ""), add_special_tokens=False).ids
        ids = encode(response.replace(END_OF_TEXT, "</s>"), add_special_tokens=False).ids
        rows.append(([tokenizer.bos_token_id, *prompt], ids))
    return padded_rows(rows, tokenizer)


def padded_rows(
    rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels `[rows, time]` of (prompt, response), right-padded; labels are the response's tokens."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels


def reward_response(question: Question, rng: random.Random, max_checks: int) -> list[str]:
    """A response's lines in any style a policy may fall into, mistakes and rambling included."""
    style = rng.random()
    if style < 0.15:
        lines = direct(question, right=rng.random() < 0.5)
    else:
        lines = derived(question, rng.randint(0, max_checks))
    # So many slips a response, not a line: else the long ones would be bad on average, and length itself look bad.
    slips = rng.choice((0.0, 0.0, 0.5, 1.5)) / len(lines)
    lines = [change_line(line, rng) if rng.random() < slips else line for line in lines]
    if rng.random() < 0.25:
        lines = corrupt(lines, rng)
    if style > 0.9:  # a wrong answer below a right derivation, which a judge of style alone would not notice
        lines = [f"so {rng.choice(DIGITS)}" if line.startswith("so") and rng.random() < 0.5 else line for line in lines]
    if rng.random() < 0.3:
        lines.append(f"Q:{draw_question(rng).content}")
    return lines


def minimal_pair(lines: list[str], rng: random.Random) -> list[str]:
    """The same response but for one character of the first block, half the time that of its answer."""
    lines = list(lines)
    end = next((i for i, line in enumerate(lines) if line.startswith("so")), len(lines) - 1)
    at = end if rng.random() < 0.5 else rng.randint(0, end)
    if not lines[at].startswith("Q:"):
        lines[at] = change_line(lines[at], rng)
    return lines


def scored_ids(
    question: Question, lines: list[str], ended: bool, tokenizer: PreTrainedTokenizerFast, max_response: int
) -> tuple[list[int], list[float], int]:
    """A conversation's ids, the utility of each of its prefixes, and where the response begins.

    A line counts from its last token on, as `utility` of the cut text would have it.
    """
    encode = tokenizer.backend_tokenizer.encode
    ids = encode(reward_text(question.content, "")).ids
    start, labels, worth = len(ids), [0.0] * len(ids), 0.0
    gains = list(line_utilities(question, lines))
    for i, (line, gain) in enumerate(zip(lines, gains, strict=False)):
        line_ids = encode(("\n" if i else "") + line, add_special_tokens=False).ids
        ids += line_ids
        labels += [worth] * (len(line_ids) - 1) + [worth + gain]
        if line.startswith("Q:"):  # the mark itself is the offence
            labels[-len(line_ids) + 1 :] = [worth + gain] * (len(line_ids) - 1)
        worth += gain
    if ended:
        ids.append(tokenizer.eos_token_id)
        labels.append(worth - (0.0 if any(line.startswith("so") for line in lines) else 1.0))
    keep = start + max_response
    return ids[:keep], labels[:keep], start


def reward_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_prompts: int, max_checks: int, max_response: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask, prefix utilities and scored mask, `[2 * prompts, time]`; rows 2i and 2i+1 are a pair."""
    rows = []
    for _ in range(num_prompts):
        question = draw_question(rng)
        one = reward_response(question, rng, max_checks)
        other = minimal_pair(one, rng) if rng.random() < 0.5 else reward_response(question, rng, max_checks)
        rows += [scored_ids(question, lines, rng.random() < 0.5, tokenizer, max_response) for lines in (one, other)]
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attended, utilities, scored = ids.bool(), ids.float(), ids.bool()
    for i, (row_ids, row_labels, start) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        attended[i, : len(row_ids)] = True
        utilities[i, : len(row_ids)] = torch.tensor(row_labels)
        scored[i, start : len(row_ids)] = True
    return ids, attended, utilities, scored
