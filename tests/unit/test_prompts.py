import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2f_ray.data.prompts import PromptSet, PromptSource, build_prompt_set, draw, prompt_groups
from c2f_ray.data.templates import PLAIN_TEMPLATE, chat_template, render
from c2f_ray.data.trajectory import Ragged
from c2f_ray.errors import RecipeError
from c2f_ray.tiny.tokenizer import policy_tokenizer

TEMPLATE = "{% for m in messages %}Q:{{ m['content'] }}\nA:{% endfor %}"


def source(path: Path, **settings) -> PromptSource:
    return PromptSource(key="prompts.source", source=str(path), **settings)


def jsonl(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_and_chat_messages_are_the_same_prompt(tmp_path: Path):
    path = jsonl(
        tmp_path,
        {"id": "a", "messages": "b=c,b?"},
        {"id": "b", "messages": [{"role": "user", "content": "b=c,b?"}], "answer": "3"},
    )
    assert source(path).load() == [
        ("a", [{"role": "user", "content": "b=c,b?"}], {}),
        ("b", [{"role": "user", "content": "b=c,b?"}], {"answer": "3"}),
    ]


def test_a_conversation_ends_at_its_last_or_first_user_message(tmp_path: Path):
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    path = jsonl(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    contents = {
        turns: [m["content"] for m in source(path, turns=turns, system="s").load()[0][1]] for turns in ("all", "first")
    }
    assert contents == {"all": ["s", "1", "2", "3"], "first": ["s", "1"]}


def test_parquet_reads_like_jsonl(tmp_path: Path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": "x", "prompt": "b=3,b?"}]), path)
    assert source(path, field="prompt").load() == [("x", [{"role": "user", "content": "b=3,b?"}], {})]


def test_a_hugging_face_dataset_reads_like_jsonl(tmp_path: Path):
    """Any name that `datasets` can load; here a local dataset, with a split of its own."""
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"id": "t", "text": "b=3,b?"}\n')
    (folder / "test.jsonl").write_text('{"id": "x", "text": "c=3,c?"}\n{"id": "y", "text": "d=3,d?"}\n')
    prompts = source(folder, field="text", split="test").load()
    assert [(prompt_id, messages[0]["content"]) for prompt_id, messages, _ in prompts] == [
        ("x", "c=3,c?"),
        ("y", "d=3,d?"),
    ]
    with pytest.raises(RecipeError, match=r"prompts.source: no/such: neither a .jsonl or .parquet file nor a dataset"):
        PromptSource(key="prompts.source", source="no/such").load()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"messages": "a"}\n{"messages": \n', r"prompts.jsonl:2: not valid JSON"),
        ('{"messages": "a"}\n\n{"prompt": "b"}\n', r"prompts.jsonl:3: no field 'messages'; it has prompt"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}\n', r"prompts.jsonl:1: 'messages' is neither text nor"),
        ('["a"]\n', r"prompts.jsonl:1: no field 'messages'"),
        ('{"messages": [{"role": "tool", "content": "b"}]}\n', r"prompts.jsonl:1: .* roles system, user, assistant"),
        ('{"messages": "\udcff"}\n', r"prompts.jsonl:1: not valid JSON"),
        ("", r"prompts.source: .*prompts.jsonl: holds no prompts"),
    ],
)
def test_malformed_prompts_name_file_and_line(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(RecipeError, match=problem):
        source(path).load()


def test_what_is_no_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "prompts.parquet").write_text("words")
    with pytest.raises(RecipeError, match=r"prompts.source: .*prompts.parquet: not a Parquet file"):
        source(tmp_path / "prompts.parquet").load()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system role here') }}", "prompt '1': the chat template fails on it: no system role"),
        ("{% if %}", "prompt '1': the chat template fails on it"),
        ("{# nothing #}", "prompt '1' is empty: the chat template leaves nothing of it"),
    ],
)
def test_a_template_that_fails_names_the_prompt(tmp_path: Path, template: str, problem: str):
    path = jsonl(tmp_path, {"messages": "b=3,b?"})
    with pytest.raises(RecipeError, match=problem):
        build_prompt_set(source(path), policy_tokenizer(with_template=False), template, 48, "drop")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"prompts.source: .*nothing.jsonl: no such file"):
        source(tmp_path / "nothing.jsonl").load()


def test_long_prompts_are_dropped_and_counted_or_refused(tmp_path: Path):
    path = jsonl(tmp_path, {"id": "short", "messages": "b=3,b?"}, {"id": "long", "messages": "b=3,c=b,c?"})
    tokenizer = policy_tokenizer(with_template=False)
    short = len(tokenizer("Q:b=3,b?\nA:")["input_ids"])
    prompts = build_prompt_set(source(path), tokenizer, TEMPLATE, max_tokens=short, too_long="drop")
    assert (prompts.ids, prompts.num_dropped, prompts.tokens.lengths.tolist()) == (["short"], 1, [short])
    assert tokenizer.decode(prompts.tokens[0]) == "Q:b=3,b?\nA:"
    with pytest.raises(
        RecipeError, match=f"prompt 'long' has {short + 3} tokens, more than prompts.max_tokens {short}"
    ):
        build_prompt_set(source(path), tokenizer, TEMPLATE, max_tokens=short, too_long="refuse")
    with pytest.raises(RecipeError, match="all 2 prompts are longer"):
        build_prompt_set(source(path), tokenizer, TEMPLATE, max_tokens=2, too_long="drop")


def test_the_same_id_twice_is_refused(tmp_path: Path):
    path = jsonl(tmp_path, {"id": "a", "messages": "b=3,b?"}, {"id": "a", "messages": "c=3,c?"})
    with pytest.raises(RecipeError, match="prompt id 'a' is given twice"):
        build_prompt_set(source(path), policy_tokenizer(with_template=False), TEMPLATE, max_tokens=48, too_long="drop")


def test_a_seeded_choice_of_prompts(tmp_path: Path):
    path = jsonl(tmp_path, *({"id": str(i), "messages": "b=3,b?"} for i in range(20)))
    chosen = [[p[0] for p in source(path, num_prompts=5, seed=seed).load()] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5
    with pytest.raises(RecipeError, match="holds 20 prompts, fewer than 21"):
        source(path, num_prompts=21).load()


TEN = [list(range(10))]


def test_every_epoch_draws_every_prompt_once_in_its_own_order():
    drawn = [draw(position, 4, TEN, seed=7, shuffle=True) for position in range(0, 20, 4)]
    rows = [row for step in drawn for row, _ in step]
    epochs = [epoch for step in drawn for _, epoch in step]
    assert epochs == [0] * 10 + [1] * 10
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert draw(8, 4, TEN, seed=7, shuffle=True) == drawn[2], "a position alone says what comes next"
    assert [row for row, _ in draw(8, 4, TEN, seed=7, shuffle=False)] == [8, 9, 0, 1]


def test_the_plain_template_and_the_missing_one():
    tokenizer = policy_tokenizer(with_template=False)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert render(tokenizer, PLAIN_TEMPLATE, messages) == "System: s\n\nUser: u\n\nAssistant:"
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=r"policy.chat_template: .* has no chat template; set it to `plain`"):
        chat_template("model", tokenizer)
    with pytest.raises(RecipeError, match=r"policy.chat_template: nowhere.jinja: no such file"):
        chat_template("nowhere.jinja", tokenizer)


def test_groups_are_drawn_equally_often(tmp_path: Path):
    """Three prompts of one source and two of another, over an epoch of the larger one."""
    ids = [f"{source}{i}" for source, count in (("a", 3), ("b", 2)) for i in range(count)]
    prompts = PromptSet(
        ids, [[]] * 5, [{"source": name[0]} for name in ids], Ragged.from_rows([[1]] * 5, np.int32), num_dropped=0
    )
    groups = prompt_groups(prompts, "source")
    assert groups == [[0, 1, 2], [3, 4]]
    drawn = draw(0, 6, groups, seed=1, shuffle=True)
    assert [row < 3 for row, _ in drawn] == [True, False] * 3
    assert sorted(row for row, _ in drawn[::2]) == [0, 1, 2]
    assert [epoch for _, epoch in drawn[1::2]] == [0, 0, 1], "the smaller one begins again"
    assert draw(4, 2, groups, seed=1, shuffle=True) == drawn[4:]
    assert prompt_groups(prompts, None) == [[0, 1, 2, 3, 4]]
    with pytest.raises(RecipeError, match="prompts.uniform_over: prompt a0 has no field 'topic'; it has source"):
        prompt_groups(prompts, "topic")
