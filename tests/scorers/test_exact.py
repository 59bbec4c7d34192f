"""The number that an answer ends in, against hand-made texts and against the marks that GSM8K's authors gave."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from tests.models_made import make_model
from tests.shared import SHARED, needs_shared
from tests.toy import metrics, run
from trueup.scorers.exact import final_number, gsm8k

DATA = SHARED / "data" / "gsm8k"
needs_data = needs_shared("data/gsm8k")


@pytest.mark.parametrize(
    "text, number",
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"),
        ("#### $1,234.50", "1234.5"),
        ("#### 109,200,000 people", "109200000"),
        ("####-3", "-3"),
        ("#### -$ 18.", "-18"),
        ("#### 18.00", "18"),
        ("#### .5", "0.5"),
        ("#### 5 of 9", "5"),
        ("#### 5\nNo: #### 6", "6"),
        ("#### none of the 7", "7"),
        ("#### none", None),
        ("The 3 of them pay $12, so each pays $4.", "4"),
        ("16-3-4=9 and 10-2", "2"),
        ("It falls to -2", "-2"),
        ("1, 2, 3", "3"),
        ("in 2,5000 ways", "5000"),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_one_where_it_is_right_nothing_where_no_answer_is_known():
    said = [[{"role": "assistant", "content": text}] for text in ("#### 1000", "999", "none", "#### 3")]
    assert gsm8k(prompts=[], completions=said, answer=["#### 1,000", "#### 1,000", "#### 0", None]) == [1, 0, 0, None]


@needs_data
def test_every_answer_of_gsm8k_has_a_number_and_is_right_by_itself():
    for file in ("train", "test"):
        answers = [json.loads(line)["answer"] for line in (DATA / f"{file}.jsonl").open()]
        said = [[{"role": "assistant", "content": answer}] for answer in answers]
        assert sum(gsm8k(said, answers)) == len(answers) > 1300
        for answer in answers:
            assert final_number(answer) == Decimal(answer.rpartition("#### ")[2].replace(",", ""))


@needs_data
def test_it_marks_model_solutions_as_the_authors_did():
    """5276 solutions with the authors' own marks; they end in `A: 18` and the marks compare what stands there."""
    rows = [json.loads(line) for line in (DATA / "example_model_solutions.jsonl").open()]
    pairs = [(row["ground_truth"], one) for row in rows for one in row.values() if isinstance(one, dict)]
    said = [[{"role": "assistant", "content": one["solution"]}] for _, one in pairs]
    ours = gsm8k(said, [truth for truth, _ in pairs])
    agree = [mark == one["is_correct"] for mark, (_, one) in zip(ours, pairs, strict=True)]
    assert len(agree) == 5276 and all(agree)


@needs_data
def test_grpo_on_gsm8k(tmp_path):
    make_model(tmp_path / "tiny")
    stage = {
        "phase": "ppo",
        "model": "tiny",
        "scorer": "trueup.scorers.exact:gsm8k",
        "prompts": str(DATA / "test.jsonl"),
        "advantage": "grpo",
        "samples": 4,
        "batch": 8,
        "steps": 2,
        "max_prompt": 200,
        "missing_eos_samples": 8,
        "sampling": {"max_tokens": 8},
    }
    log = metrics(run(tmp_path, {"ppo": stage}, name="gsm8k")["ppo"])
    assert [row["score"] <= 1 and 0 <= row["flat_groups"] <= 1 for row in log] == [True, True]
