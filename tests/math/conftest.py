"""The published vectors, as tensors in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).with_name("vectors.json")


def tensors(value: Any) -> Any:
    """Lists of numbers, however deep, become float64 tensors; the rest stays."""
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, (int, float, list)) for item in value):
        return torch.tensor(value, dtype=torch.float64)
    return value


@pytest.fixture(scope="session")
def vector():
    """vector(section, name) -> (inputs, outputs) of a case in vectors.json."""
    sections = json.loads(FILE.read_text())["vectors"]

    def find(section: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        [case] = [case for case in sections[section] if case["name"] == name]
        return tensors(case["inputs"]), tensors(case["outputs"])

    return find


@pytest.fixture
def close():
    """close(actual, expected): equal within 1e-9, dtype, shape and all; numbers count as float64 tensors."""

    def check(actual: Any, expected: Any, atol: float = 1e-9) -> None:
        actual, expected = (
            torch.as_tensor(x, dtype=None if isinstance(x, torch.Tensor) else torch.float64) for x in (actual, expected)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)

    return check
