"""The embedded task: hand-worked utilities and grades."""

import random

import pytest

from c2f_ray.tiny import task
from c2f_ray.tiny.corpus import scored_ids
from c2f_ray.tiny.tokenizer import reward_tokenizer

QUESTION = task.parse_question("Q:b=c,a=2,f=e,e=a,c=3,d=f,b?\nA:")


def test_chain_of_the_documented_question():
    assert QUESTION.content == "b=c,a=2,f=e,e=a,c=3,d=f,b?"
    assert QUESTION.chain == (("b", "c"), ("c", "3"))
    assert (QUESTION.answer, QUESTION.other_digit, QUESTION.depth) == ("3", "2", 2)
    assert task.derived(QUESTION, 1) == ["b=c", "c=3", "so 3", "check", "b=c", "c=3", "so 3"]


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        ("", False, 0.0),
        ("", True, -1.0),
        ("so 3", True, 1.0),
        ("so 2", True, -1.0),
        ("b=c\nc=3\nso 3", True, 0.4 + 0.4 + 1.0),
        ("b=c\nc=3\nso 2", True, 0.8 - 1.0),
        ("b=c\nc=3", True, 0.8 - 1.0),
        ("b=c\nc=3\nso ", False, 0.8),  # cut before the digit: nothing gained, no junk
        ("b=c\nb=c\nc=3\nso 3", True, 1.8 - 0.1),
        ("b=e\ne=a\na=2\nso 2", True, -0.8 + 0.4 + 0.4 - 1.0),  # one slip, then rightly on from the wrong place
        ("c=3\nso 3", True, -0.8 + 1.0),  # a right entry, but not the one asked for
        ("b=c\nc=3\nso 3\ncheck\nb=c\nc=3\nso 3", False, 1.8 + 0.35),
        ("b=c\nc=3\nso 3" + "\ncheck\nb=c\nc=3\nso 3" * 2, False, 1.8 + 0.35 + 0.28),
        ("b=c\nc=3\nso 3\ncheck\nb=c\nc=4", False, 1.8 + 0.05 + 0.075 - 0.3),
        ("b=c\nc=3\nso 3\nQ:a=1,b=a,b?\nA:so 1", False, 1.8 - 1.0),
        ("b=c\nc=3\nso 3\nso 3", True, 1.8 - 0.3),
        ("check", False, -0.3),  # nothing to check yet
    ],
)
def test_utility_by_hand(response, ended, expected):
    assert task.utility(QUESTION, response, ended) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "finished", "accuracy", "strict"),
    [
        ("so 3", True, 1, 1),
        ("so 3", False, 1, 0),
        ("b=c\nc=3\nso 3", True, 1, 1),
        ("b=c\nc=3\nso 2\ncheck\nb=c\nc=3\nso 3", True, 0, 0),  # the first block's answer counts
        ("b=c\nc=3\nso 3\ncheck\nb=c\nc=3\nso 2", True, 1, 1),
        ("b=c\nc=3\ncheck\nso 3", True, 0, 0),
        ("so 3\nQ:b=3,b?\nA:so 3", True, 1, 0),
        ("b=c\nc=3\nso ", False, 0, 0),
        ("", True, 0, 0),
        ("the answer is 3", True, 0, 0),
    ],
)
def test_grades_by_hand(response, finished, accuracy, strict):
    for prompt in (QUESTION.content, f"Q:{QUESTION.content}\nA:", f"Human: a=1,b=a,b?\nAssistant: {QUESTION.content}"):
        record = {"messages": [{"role": "user", "content": prompt}]}
        assert task.accuracy(record, response, finished) == {"accuracy": accuracy, "strict": strict}


def test_grader_refuses_a_prompt_without_a_question():
    with pytest.raises(ValueError, match="no lookup question"):
        task.accuracy({"messages": [{"role": "user", "content": "What is 2 + 2?"}]}, "so 4", True)


def test_questions_split_by_their_text_and_ask_for_one_of_two_digits():
    rng = random.Random(0)
    depths = [0] * 6
    for heldout in (False, True):
        for _ in range(400):
            question = task.draw_question(rng, heldout)
            assert task.is_heldout(question.content) is heldout
            assert task.parse_question(question.content) == question
            assert {right for _, right in question.entries if right in task.DIGITS} == {
                question.answer,
                question.other_digit,
            }
            depths[question.depth] += 1
    assert depths[:2] == [0, 0]
    assert min(depths[2:]) > 150  # uniform: 200 each


def test_prefix_labels_are_the_utilities_of_the_cut_texts():
    """The reward model's dense labels and `utility` are two paths to one number, at every cut of a response."""
    rng, tokenizer = random.Random(1), reward_tokenizer()
    for _ in range(100):
        question = task.draw_question(rng)
        lines = task.corrupt(task.derived(question, 2), rng)
        ids, labels, start = scored_ids(question, lines, True, tokenizer, 200)
        ended = ids[-1] == tokenizer.eos_token_id
        assert ended
        for cut in range(start + 1, len(ids)):
            text = tokenizer.decode(ids[start:cut])
            assert task.utility(question, text, False) == pytest.approx(labels[cut - 1]), text
        assert task.utility(question, "\n".join(lines), True) == pytest.approx(labels[-1])
