"""`trueup data check` says what the phases would do, because it asks what they ask."""

from __future__ import annotations

import json
import sys

import pytest
from rich.console import Console

import trueup.check
from tests.models_made import make_model, make_tokenizer
from trueup.check import characters, histogram, token, views
from trueup.cli import main
from trueup.data.chat import Chat
from trueup.data.files import Source
from trueup.data.prepare import comparisons, demonstrations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("check")
    make_model(made / "base")
    pair = {"prompt": "Hello?", "chosen": "yes please and thank you", "rejected": "no"}
    rows = {
        "pairs": [
            pair,
            {**pair, "rejected": "yes please and thank you"},
            {"prompt": "So?", "chosen": "a", "rejected": "b " * 800, "category": "odd"},
            {"prompt": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "So?"}], "chosen": "a",
             "rejected": "b c d"},
            {**pair, "chosen": ""},
        ],
        "demos": [
            {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ça [b]\nva"}]},
        ],
        "prompts": [{"prompt": "Hi"}, {"prompt": "Hello there"}, {"prompt": "Hi"}],
    }  # fmt: skip
    for name, lines in rows.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return made


@pytest.fixture
def call(folder, monkeypatch, capsys):
    def run(*arguments: str, **console) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["trueup", "data", "check", *arguments])
        monkeypatch.setattr(
            trueup.check, "console", Console(file=sys.stdout, highlight=False, soft_wrap=True, width=120, **console)
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_comparisons(call):
    code, out, err = call("pairs.jsonl", "--model", "base", "--rows", "2")
    assert code == 0, err
    for said in (
        "pairs.jsonl: comparisons",
        "category    missing in 4 rows, text in 1 rows",
        "3 of 5 rows (dropped: 1 chosen == rejected, 1 empty chosen)",
        "3 distinct prompts",
        "a system message in 1 rows",
        "chosen and rejected are alike in 1 rows",
        "the longer reply wins 50.0% of the pairs that fit",
        "1 of 3 have more than 512 tokens (max_length 1024, the model's context 512) and are dropped whole; 2 fit.",
        "chat template: the tokenizer's own; end token '<eos>' (id 1); padding '<pad>' (id 0)",
        "row 1, chosen",
        "row 2, rejected",
        "end      <eos>",
        "padding  <pad> × ",
        "the same ",
    ):
        assert said in out, (said, out)
    assert "\x1b[" not in out  # no terminal, no colours


def test_demonstrations_show_what_the_loss_counts(call):
    code, out, err = call("demos.jsonl", "--model", "base", "--held-out", "0.5")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [words[0] for words in lines if words and words[0] in ("prompt", "counts", "end", "padding")][:6] == [
        "prompt", "counts", "end", "prompt", "counts", "end"
    ]  # fmt: skip
    assert "ç" in out and "[b]" in out.replace("│", "") and "⏎" in out
    assert "rows held out, of prompts that the other" in out


def test_prompts_and_duplicates(call):
    code, out, err = call("prompts.jsonl", "--model", "base")
    assert code == 0 and "prompts.jsonl: prompts" in out, err
    assert "2 distinct prompts; 1 come more than once, in 2 rows (most often, 2 times: 'Hi')" in out
    assert "max_prompt 512, the model's context 511" in out


def test_several_data_sets(call):
    code, out, err = call("[demos.jsonl, {path: demos.jsonl, weight: 2}]", "--model", "base", "--rows", "0")
    assert code == 0 and "an epoch takes 6 rows (100%) from demos.jsonl" in out, err


def test_colours_are_only_for_terminals(call):
    assert "\x1b[32m" in call("demos.jsonl", "--model", "base", force_terminal=True)[1]


def test_nothing_fits(call):
    code, out, err = call("demos.jsonl", "--model", "base", "--max-length", "2")
    assert code == 0 and "2 of 2 have more than 2 tokens" in out and "No row fits" in out, err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("none.jsonl", "--model", "base"), "none.jsonl: no such file"),
        (("demos.jsonl", "--model", "none"), "none: no such folder"),
        (("demos.jsonl", "--model", "base", "--as", "pairs"), "--as 'pairs': expected demonstrations"),
        (("demos.jsonl", "--model", "base", "--as", "comparisons"), "demos.jsonl, line 1: found columns 'messages'"),
        (("[{path: demos.jsonl, wait: 2}]", "--model", "base"), "data set 1: unknown key 'wait'"),
        (("[3]", "--model", "base"), "expected a path, or a list of paths"),
    ],
)
def test_mistakes_are_one_line(call, arguments, said):
    code, _, err = call(*arguments)
    (line,) = [text for text in err.splitlines() if text.startswith("trueup: ")]
    assert code == 2 and said in line


def test_the_rows_shown_are_the_batch_that_is_trained(folder):
    """A multi-turn row: every reply and its end token count, nothing else; the padding is the batch's own."""
    chat = Chat(make_tokenizer())
    found = demonstrations(chat, Source(path=str(folder / "demos.jsonl")), 100)
    for example, ((_, ids, roles),) in zip(found.train, views(found.train, chat), strict=True):
        n = len(example.ids)
        assert ids[:n] == example.ids and roles[n:] == ["padding"] * (len(ids) - n)
        assert [role in ("counts", "end") for role in roles[:n]] == example.mask
        assert [i for i, role in zip(ids, roles, strict=True) if role == "end"] == [chat.end_id] * roles.count("end")
    assert len({len(parts[0][1]) for parts in views(found.train, chat)}) == 1
    pairs = comparisons(chat, str(folder / "pairs.jsonl"), 100).train
    for pair, sides in zip(pairs, views(pairs, chat), strict=True):
        for (_, ids, roles), whole in zip(sides, (pair.chosen, pair.rejected), strict=True):
            assert ids[: len(whole)] == whole and roles[: len(whole)].count("prompt") == pair.prompt
            assert roles[len(whole) - 1] == "end"


def test_tokens_that_are_no_text_alone_stand_together():
    chat = Chat(make_tokenizer())
    ids = chat.tokenizer("ça\nva ’so", add_special_tokens=False)["input_ids"]
    shown = [token(chat, group) for group in characters(chat, ids)]
    assert "".join(shown) == "ça⏎va␣’so" and "ç" in shown
    assert len(ids) > len(shown)
    half = ids[:1]
    assert "\ufffd" not in token(chat, half)


def test_the_histogram_counts_every_row_once():
    lengths = sorted([*range(1, 100), 100, 5000])
    lines = list(histogram(lengths, 50))
    assert len(lines) <= 13
    numbers = [int(line[13:].replace("█", "").split()[0]) for line in lines]
    assert sum(numbers) == len(lengths)
    assert lines[-1].strip().startswith("over ") and "dropped" in lines[-1]
    assert [line for line in lines if "the limit, 50, lies here" in line]
    assert list(histogram([], 50)) == []
