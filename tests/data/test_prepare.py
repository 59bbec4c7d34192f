"""What phases work on: no prompt on both sides, what is too long left out whole, data sets mixed by weight."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.models_made import make_tokenizer
from trueup.config import parse
from trueup.data.chat import Chat
from trueup.data.files import Source
from trueup.data.prepare import comparisons, demonstrations, draw, longer_wins, mixed, prompts
from trueup.phases.ppo import PPOConfig
from trueup.phases.sft import SFTConfig
from trueup.records import UserError

PHASES = Path(__file__).parents[2] / "src" / "trueup" / "phases"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(make_tokenizer())


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(numbers: list[int], side: str = "a") -> list[dict]:
    return [{"prompt": f"{n}?", "completion": side, "chosen": side * 2, "rejected": "b"} for n in numbers]


def test_no_prompt_is_on_both_sides_whatever_file_it_stands_in(tmp_path, chat):
    """In every form that a phase reads, with prompts that come twice in a file and again in another."""
    chats = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "completion": "z", "chosen": "zz"}
        for row in pairs([*range(100, 300)])
    ]
    data = (
        Source(path=write(tmp_path / "a.jsonl", pairs([*range(200)] * 2))),
        Source(path=write(tmp_path / "b.jsonl", chats), weight=1.5),
    )
    demos = demonstrations(chat, data, 100, held_out=0.3)
    asked = prompts(data, chat.prompt_length, 100, held_out=0.3)
    judged = comparisons(chat, data, 100, held_out=0.3)
    sides = [
        ({e.demonstration.prompt for e in demos.train}, {e.demonstration.prompt for e in demos.held}),
        ({p.preference.prompt for p in judged.train}, {p.preference.prompt for p in judged.held}),
        (set(asked.train), set(asked.held)),
    ]
    for train, held in sides:
        assert not train & held and len(train | held) == 300 and 60 < len(held) < 120
        assert (train, held) == sides[0]  # SFT, reward model and PPO hold the same prompts out
    assert len(asked.records) == 300 and len(demos.records) == 600
    assert len({e.demonstration for e in demos.held}) == len(
        {(e.demonstration.prompt, e.demonstration.reply) for e in demos.held}
    )


def test_phases_that_split_read_through_here():
    """A phase with `held_out` that read its data otherwise could put a prompt on both sides."""
    for file in PHASES.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        if "held_out" in file.read_text():
            assert "trueup.data.prepare" in modules, file
        # A reader may be handed to `prepare`, which calls it; nobody else may call one.
        readers = {"read_demonstrations", "read_preferences", "read_prompts", "read_thumbs"}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & readers and (not names & readers or "prepare" in called), file


def test_what_is_too_long_is_left_out_whole_and_counted(tmp_path, chat):
    rows = pairs([1, 2, 3])
    rows[1]["completion"] = rows[1]["rejected"] = "b" * 100
    path = write(tmp_path / "a.jsonl", rows)
    for found in (demonstrations(chat, path, 60), comparisons(chat, path, 60)):
        assert len(found.train) == 2 and found.too_long == 1 and len(found.lengths) == 3
        assert "1 over 60 tokens" in found.counted() and found.results()["too_long"] == 1
    assert demonstrations(chat, path, 1).train == [] and demonstrations(chat, path, 1).too_long == 3


def test_a_limit_is_the_last_length_that_fits(tmp_path, chat):
    path = write(tmp_path / "a.jsonl", pairs([1]))
    (length,) = demonstrations(chat, path, 100).lengths
    assert demonstrations(chat, path, length).train and not demonstrations(chat, path, length - 1).train


def test_weights_say_how_often_an_epoch_sees_a_row(tmp_path, chat):
    data = [
        {"path": write(tmp_path / "twice.jsonl", pairs([*range(10)], "t")), "weight": 2},
        {"path": write(tmp_path / "part.jsonl", pairs([*range(10, 30)], "p")), "weight": 1.25},
        write(tmp_path / "once.jsonl", pairs([*range(30, 35)], "o")),
    ]
    found = demonstrations(chat, data, 100, seed=3)
    seen = Counter((e.demonstration.reply, e.demonstration.prompt.text) for e in found.train)
    assert Counter(reply for reply, _ in seen.elements()) == {"t": 20, "p": 25, "o": 5}
    assert {n for (reply, _), n in seen.items() if reply == "t"} == {2}
    assert Counter(n for (reply, _), n in seen.items() if reply == "p") == {1: 15, 2: 5}
    assert list(found.mix.values()) == [20, 25, 5]
    assert "twice.jsonl 20 rows (40%)" in found.counted() and found.results()["mix"] == found.mix

    def order(seed: int) -> list[str]:
        return [e.demonstration.prompt.text for e in demonstrations(chat, data, 100, seed=seed).train]

    assert order(3) == [e.demonstration.prompt.text for e in found.train] != order(4)
    assert [p.preference.prompt.text for p in comparisons(chat, data, 100, seed=3).train] == order(3)
    assert [p.text for p in prompts(data, chat.prompt_length, 100, seed=3).train] == order(3)


def test_a_data_set_gives_only_rows_of_the_categories_named(tmp_path, chat):
    """People's comparisons of some, an AI's of others; the rest is counted."""
    kinds = ["fact", "harm", None, "list"]
    path = write(tmp_path / "a.jsonl", [{**row, "category": kinds[i % 4]} for i, row in enumerate(pairs([*range(8)]))])
    data = [{"path": path, "categories": ["harm", "list"]}, {"path": path, "categories": ["fact"], "weight": 2}]
    found = comparisons(chat, data, 100)
    assert Counter(p.preference.prompt.category for p in found.train) == {"harm": 2, "list": 2, "fact": 4}
    assert found.results()["dropped"] == {"of other categories": 4 + 6}
    assert list(found.mix) == [f"{path} harm list", f"{path} fact"]
    with pytest.raises(
        UserError, match=r"no usable rows; .*of other categories.*; categories there: fact, harm, list, none"
    ):
        comparisons(chat, [{"path": path, "categories": ["facts"]}], 100)


def test_any_stretch_from_the_first_row_holds_the_shares():
    rows = mixed([[*"a" * 30], [*"b" * 10], []])
    assert all(abs(rows[:n].count("a") - 0.75 * n) <= 1 for n in range(41))
    assert mixed([[3, 1, 2]]) == [3, 1, 2]


def test_a_prompt_of_two_data_sets_counts_once(tmp_path, chat):
    data = [
        write(tmp_path / "a.jsonl", [{"prompt": "x", "from": "a"}] * 2),
        write(tmp_path / "b.jsonl", [{"prompt": "x", "from": "b"}, {"prompt": "y"}]),
    ]
    found = prompts(data, chat.prompt_length, 100)
    assert sorted((p.text, p.meta.get("from", "")) for p in found.train) == [("x", "a"), ("y", "")]


def test_a_weight_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"a: weight 0.01 leaves none of its 10 rows"):
        draw([*range(10)], Source(path="a", weight=0.01), [0, 0])


def test_a_config_takes_one_path_or_several():
    assert parse(SFTConfig, {"model": "m", "data": "a.jsonl"}, "sft").data == "a.jsonl"
    listed = parse(SFTConfig, {"model": "m", "data": ["a", {"path": "b", "weight": 0.5}]}, "sft").data
    assert [(d.path, d.weight, d.split) for d in listed] == [("a", 1.0, "train"), ("b", 0.5, "train")]
    (one,) = parse(PPOConfig, {"model": "m", "scorer": "s", "prompts": {"path": "b", "split": "test"}}, "ppo").prompts
    assert one.split == "test"


@pytest.mark.parametrize(
    "data, said",
    [
        ([{"path": "a", "weigth": 2}], "data set 1: unknown key 'weigth'; did you mean 'weight'?"),
        (["a", {"weight": 2}], "data set 2: key 'path' is missing"),
        ([{"path": "a", "weight": 0}], "data set 1: key 'weight': Input should be greater than 0"),
        ([{"path": "a", "weight": float("nan")}], "data set 1: key 'weight'"),
        ([], "expected a path, or a list of paths"),
        (3, "expected a path, or a list of paths"),
    ],
)
def test_mistakes_in_a_list_of_data_sets_are_one_line(data, said):
    with pytest.raises(UserError) as error:
        parse(SFTConfig, {"model": "m", "data": data}, "sft")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_share_of_pairs_that_the_longer_reply_wins(tmp_path, chat):
    rows = [
        {"prompt": "?", "chosen": "a b c d", "rejected": "a"},
        {"prompt": "?", "chosen": "b", "rejected": "a b c d"},
        {"prompt": "?", "chosen": "b", "rejected": "a b c d", "label": 0.25},
        {"prompt": "?", "chosen": "a", "rejected": "b"},
    ]
    found = comparisons(chat, write(tmp_path / "a.jsonl", rows), 100)
    assert longer_wins(found.train) == (1 + 0 + 0.75 + 0.5) / 4
    assert all(p.chosen[: p.prompt] == p.rejected[: p.prompt] for p in found.train)
    assert chat.tokenizer.decode(found.train[0].chosen[found.train[0].prompt :]) == " a b c d<eos>"
