"""Every layout of columns, and one clear line for every kind of bad file."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trueup.data.readers import (
    read_demonstrations,
    read_preferences,
    read_prompts,
    read_thumbs,
    select_by_prompt,
    split_by_prompt,
)
from trueup.records import Prompt, UserError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [{"messages": [USER, REPLY]}, {"prompt": "Hi", "completion": "Hello"}, {"prompt": [USER], "completion": [REPLY]}],
)
def test_demonstrations(tmp_path, row):
    found = read_demonstrations(write(tmp_path / "d.jsonl", row)).records
    assert [(d.prompt, d.reply) for d in found] == [(Prompt.of("Hi"), "Hello")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "Go"}]},
        {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [{"role": "assistant", "content": "Go"}]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "Go"}]},
        {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "Go"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    ],
)
def test_preferences(tmp_path, row):
    row |= {"label": 0.75, "margin": 2, "weight": 0.5, "category": "greeting", "rejected_ended": False}
    (p,) = read_preferences(write(tmp_path / "p.jsonl", row)).records
    assert (p.prompt, p.chosen.text.strip(), p.rejected.text.strip()) == (Prompt.of("Hi"), "Hello", "Go")
    assert (p.label, p.margin, p.weight, p.prompt.category) == (0.75, 2, 0.5, "greeting")
    assert p.chosen.ended and not p.rejected.ended


def test_thumbs(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        {"prompt": "Hi", "completion": "Hello", "label": True, "category": "greeting"},
        {
            "prompt": [USER],
            "completion": [{"role": "assistant", "content": "Go"}],
            "label": 0,
            "completion_ended": False,
        },
        {"prompt": [USER], "completion": [USER, REPLY], "label": 1},
    )
    found = read_thumbs(path).records
    assert [(t.prompt, t.completion.text, t.completion.ended, t.good) for t in found] == [
        (Prompt.of("Hi"), "Hello", True, True),
        (Prompt.of("Hi"), "Go", False, False),
        (Prompt.of("Hi"), "Hello", True, True),
    ]
    assert found[0].prompt.category == "greeting"


@pytest.mark.parametrize(
    "row, said",
    [
        ({"label": "yes"}, "column 'label' must be true or false, found 'yes'"),
        ({"label": 0.7}, "column 'label' must be true or false, found 0.7"),
        ({"label": None}, "column 'label' is missing; found 'prompt', 'completion'"),
        ({"completion": 3}, "column 'completion' must be text, found int"),
        ({"prompt": [USER, REPLY]}, "column 'prompt' must end with the user's turn"),
    ],
)
def test_bad_thumbs_name_file_line_and_column(tmp_path, row, said):
    good = {"prompt": "Hi", "completion": "a", "label": True}
    with pytest.raises(UserError, match=r"t\.jsonl, line 2: ") as error:
        read_thumbs(write(tmp_path / "t.jsonl", good, good | row))
    assert said in str(error.value)
    with pytest.raises(UserError, match="column 'label' is missing; found 'prompt', 'completion'"):
        read_thumbs(write(tmp_path / "t.jsonl", {"prompt": "Hi", "completion": "a"}))


def test_transcripts_of_several_turns(tmp_path):
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    (p,) = read_preferences(write(tmp_path / "p.jsonl", {"chosen": text + "x", "rejected": text + "y"})).records
    assert [m["content"] for m in p.prompt.messages] == ["a", "b", "c"]
    assert p.chosen.text == "x"
    split = {"prompt": text, "chosen": "x", "rejected": "y"}  # what HH looks like where its prompts stand apart
    assert read_preferences(write(tmp_path / "s.jsonl", split)).records == [p]
    assert read_prompts(tmp_path / "s.jsonl").records == [p.prompt]
    assert read_demonstrations(write(tmp_path / "d.jsonl", {"prompt": text, "completion": "x"})).records[0].reply == "x"


def test_conversations_that_go_on_from_the_prompt(tmp_path):
    """The prompt is all that both share, with the system message that a prompt of one question leaves out."""
    system = {"role": "system", "content": "Be kind."}
    shared = [system, USER, REPLY, {"role": "user", "content": "Who are you?"}]
    row = {
        "prompt": "Hi",
        "chosen": [*shared, {"role": "assistant", "content": "A friend."}],
        "rejected": [*shared, {"role": "assistant", "content": "Nobody."}],
    }
    (p,) = read_preferences(write(tmp_path / "p.jsonl", row)).records
    assert (list(p.prompt.messages), p.chosen.text, p.rejected.text) == (shared, "A friend.", "Nobody.")
    whole = {**row, "prompt": [system, USER]}
    assert read_preferences(write(tmp_path / "w.jsonl", whole)).records == [p]


def test_prompts_from_any_file(tmp_path):
    for row in (
        {"prompt": "Hi"},
        {"messages": [USER, REPLY]},
        {"messages": [USER]},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    ):
        assert read_prompts(write(tmp_path / "p.jsonl", row)).records == [Prompt.of("Hi")]


def test_other_columns_stay_with_the_prompt_where_json_can_hold_them(tmp_path):
    row = {"question": "1 + 1?", "answer": "2", "meta": {"from": "a book"}, "level": 3, "tags": ["sum", {"n": None}]}
    kept = {"answer": "2", "from": "a book", "level": 3, "tags": ["sum", {"n": None}]}
    (found,) = read_prompts(write(tmp_path / "p.jsonl", {**row, "none": None})).records
    assert found == Prompt.of("1 + 1?") and found.meta == kept
    (demo,) = read_demonstrations(tmp_path / "p.jsonl").records
    assert (demo.prompt.text, demo.reply, demo.prompt.meta) == ("1 + 1?", "2", kept)
    day = datetime.date(2020, 1, 1)
    table = pa.Table.from_pylist([{"prompt": "Hi", "day": day, "days": [day], "raw": b"x", "level": 3, "tags": ["a"]}])
    pq.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet").records[0].meta == {"level": 3, "tags": ["a"]}
    texts = {"messages": [USER, REPLY], "chosen": "a", "rejected": "b", "completions": ["c"], "question": "no"}
    assert read_prompts(write(tmp_path / "t.jsonl", texts)).records[0] == Prompt.of("Hi")
    assert not read_prompts(tmp_path / "t.jsonl").records[0].meta


def test_useless_rows_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": "same", "rejected": "same "},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
        {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, REPLY, USER, REPLY]},
    ]
    found = read_preferences(write(tmp_path / "p.jsonl", *rows))
    assert len(found) == 1 and found.dropped == {
        "chosen == rejected": 1,
        "pairs whose conversations differ before the last turn": 2,
    }
    assert "1 of 4 rows" in found.note()


@pytest.mark.parametrize(
    "rows, said",
    [
        (['{"prompt": "Hi", '], "line 1: broken JSON"),
        ([{"prompt": "Hi", "completion": "x"}, "[1]"], "line 2: expected an object"),
        ([{"promt": "Hi", "completion": "x"}], "line 1: found columns 'promt', 'completion'"),
        ([{"messages": [USER]}], "must end with the assistant's turn"),
        ([{"messages": [{"role": "human", "content": "Hi"}, REPLY]}], "role 'human'"),
        ([{"messages": [USER, USER, REPLY]}], "roles out of order"),
        ([{"prompt": 3, "completion": "x"}], "must be text or a list"),
        ([], "no usable rows"),
    ],
)
def test_bad_demonstrations_name_file_and_line(tmp_path, rows, said):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError, match=r"bad\.jsonl") as error:
        read_demonstrations(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="unknown kind of file"):
        read_prompts(write(tmp_path / "a.txt", "Hi"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl, line 1: not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
    for name in ("a.parquet", "a.jsonl.gz"):
        write(tmp_path / name, "neither")
        with pytest.raises(UserError, match=name):
            read_prompts(tmp_path / name)


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def test_sharegpt(tmp_path):
    path = write(tmp_path / "s.jsonl", {"conversations": SHAREGPT, "id": 7}, {"conversations": [USER, REPLY]})
    one, other = read_demonstrations(path).records
    assert one == other and (one.prompt, one.reply, one.prompt.meta) == (Prompt.of("Hi"), "Hello", {"id": 7})
    assert read_prompts(path).records == [Prompt.of("Hi")] * 2
    system = {"from": "system", "value": "Be kind."}
    row = {"conversations": [system, *SHAREGPT, {"from": "human", "value": "So?"}, {"from": "gpt", "value": "So."}]}
    (demo,) = read_demonstrations(write(tmp_path / "m.jsonl", row)).records
    assert [m["role"] for m in demo.prompt.messages] == ["system", "user", "assistant", "user"] and demo.reply == "So."
    sides = {"chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "Go"}}
    (p,) = read_preferences(write(tmp_path / "p.jsonl", {"conversations": SHAREGPT[:1], **sides})).records
    assert (p.prompt, p.chosen.text, p.rejected.text) == (Prompt.of("Hi"), "Hello", "Go")


@pytest.mark.parametrize(
    "conversations, said",
    [
        (SHAREGPT[::-1], "column 'conversations': roles out of order (assistant, user)"),
        ([SHAREGPT[0]], "column 'conversations' must end with the assistant's turn"),
        ([SHAREGPT[0], {"from": "tool", "value": "x"}], "role 'tool'; expected one of human, user, gpt"),
        ([{"from": "human", "value": 3}], "each message needs a role and a content that is text"),
    ],
)
def test_bad_sharegpt_names_the_column(tmp_path, conversations, said):
    with pytest.raises(UserError, match=r"s\.jsonl, line 1: ") as error:
        read_demonstrations(write(tmp_path / "s.jsonl", {"conversations": conversations}))
    assert said in str(error.value)


def test_the_column_system_stands_above_the_conversation(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    pair = {"question": "Hi", "chosen": "a", "rejected": "b"}
    rows = [{"prompt": "Hi", "completion": "x"}, {"messages": [USER, REPLY]}, {"instruction": "Hi", "output": "x"}]
    path = write(tmp_path / "d.jsonl", *({**row, "system": "Be kind."} for row in rows))
    assert [list(d.prompt.messages) for d in read_demonstrations(path).records] == [[system, USER]] * 3
    found = read_preferences(write(tmp_path / "p.jsonl", {**pair, "system": "Be kind."}, {**pair, "system": " "}))
    assert [len(p.prompt.messages) for p in found.records] == [2, 1]
    assert read_prompts(tmp_path / "p.jsonl").records == [p.prompt for p in found.records]
    own = {"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY], "system": "Be kind."}
    (demo,) = read_demonstrations(write(tmp_path / "o.jsonl", own)).records
    assert demo.prompt.messages[0]["content"] == "Be brief."
    with pytest.raises(UserError, match="column 'system' must be text, found int"):
        read_prompts(write(tmp_path / "n.jsonl", {"prompt": "Hi", "system": 3}))


def test_empty_texts_are_dropped_and_counted(tmp_path):
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    blank = [{"role": "user", "content": " "}]
    rows = [pair, {**pair, "chosen": " "}, {**pair, "prompt": ""}, {**pair, "prompt": blank}, {**pair, "rejected": ""}]
    found = read_preferences(write(tmp_path / "p.jsonl", *rows))
    assert found.dropped == {"empty chosen": 1, "empty prompts": 2}
    assert [p.rejected.text for p in found.records] == ["b", ""]  # a model may say nothing, and be worse for it
    demos = [{"prompt": "Hi", "completion": "x"}, {"prompt": "Hi", "completion": ""}, {"messages": [*blank, REPLY]}]
    assert read_demonstrations(write(tmp_path / "d.jsonl", *demos)).dropped == {"empty replies": 1, "empty prompts": 1}
    assert read_prompts(tmp_path / "d.jsonl").dropped == {"empty prompts": 1}


TWO_HUMANS = "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: "


@pytest.mark.parametrize(
    "row, said",
    [
        ({"label": 1.5}, "column 'label' must lie in [0, 1]"),
        ({"weight": -1}, "'weight' must not be negative"),
        *(({name: float("nan")}, f"column '{name}' must be a finite number") for name in ("label", "margin", "weight")),
        *(({name: float("inf")}, f"column '{name}' must be a finite number") for name in ("label", "margin", "weight")),
        ({"margin": -(10**400)}, "column 'margin' must be a finite number"),
        ({"weight": "2"}, "column 'weight' must be a finite number, found '2'"),
        ({"chosen": [{"role": "user", "content": "Ho"}, REPLY]}, "column 'chosen' holds a conversation that does not"),
        ({"prompt": [{"role": "system", "content": "x"}, USER], "rejected": [USER, REPLY]}, "column 'rejected' holds"),
        ({"prompt": [USER, REPLY, USER], "chosen": [USER, REPLY]}, "column 'chosen' holds a conversation"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: so far"}, "column 'prompt' must end with the user's turn"),
        ({"prompt": TWO_HUMANS}, "column 'prompt': roles out of order (user, user, assistant)"),
    ],
)
def test_bad_preferences_name_file_line_and_column(tmp_path, row, said):
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: ") as error:
        read_preferences(write(tmp_path / "p.jsonl", good, good | row))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_transcript_with_two_human_turns_in_a_row_is_refused(tmp_path):
    row = {"chosen": TWO_HUMANS + "a", "rejected": TWO_HUMANS + "b"}
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: column 'chosen': roles out of order"):
        read_preferences(write(tmp_path / "p.jsonl", row))


def test_instructions_and_their_instances(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "instances": [{"input": "", "output": "0"}, {"input": "4", "output": "4"}]},
    ]
    found = read_demonstrations(write(tmp_path / "d.jsonl", *rows)).records
    assert [(d.prompt.text, d.reply) for d in found] == [("Add.\n\n1 2", "3"), ("Add.", "0"), ("Add.\n\n4", "4")]
    assert [p.text for p in read_prompts(tmp_path / "d.jsonl").records] == ["Add.\n\n1 2", "Add.", "Add.\n\n4"]


def test_parts_share_no_prompt_and_leave_none_out():
    prompts = [Prompt.of(f"question {i % 300}") for i in range(600)]
    low, high = (select_by_prompt(prompts, part, lambda p: p) for part in ((0.0, 0.7), (0.7, 1.0)))
    assert len(low) + len(high) == 600 and not set(low) & set(high)
    assert 0.6 < len(low) / 600 < 0.8


def test_splits_are_by_prompt():
    prompts = [Prompt.of(f"question {i % 300}") for i in range(900)]
    train, held = split_by_prompt(prompts, 0.2, lambda p: p)
    assert len(train) + len(held) == 900
    assert not {p.id for p in train} & {p.id for p in held}
    assert 0.1 < len(held) / 900 < 0.3
    assert split_by_prompt(prompts, 0.0, lambda p: p)[1] == []
