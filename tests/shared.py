"""The public data sets in ../shared, beside a checkout that has them."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
ABSENT = "no shared data beside this checkout"


def needs_shared(*names: str) -> pytest.MarkDecorator:
    """Skips a test where one of these files of ../shared is not there: the one skip that CI lets pass."""
    absent = [str(SHARED / name) for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"{ABSENT}: {', '.join(absent)}")
