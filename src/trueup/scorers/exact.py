"""Rewards that can be checked: the exact answer of a sum in words, as in GSM8K.

Reward functions in TRL's convention (see `trueup.scorers.functions`); the prompts file has a column `answer`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)")


def gsm8k(completions: list[Any], answer: list[str | None], **kwargs: Any) -> list[float | None]:
    """1 where the completion's final number is the answer's, else 0; None for a row without an answer."""
    said = [final_number(completion[0]["content"]) for completion in completions]
    return [
        None if right is None else float(number is not None and number == final_number(right))
        for number, right in zip(said, answer, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    """The first number after the last ####, as in `#### $1,234.50`; without ####, the last number of the text."""
    _, marked, after = text.rpartition("####")
    found = NUMBER.findall(after if marked else text)
    return Decimal(re.sub(r"[$,\s]", "", found[0 if marked else -1])) if found else None
