"""The vectors that tests/math holds to are the published ones."""

import json
from pathlib import Path

from tests.shared import SHARED, needs_shared


@needs_shared("vectors.json")
def test_the_vectors_are_the_published_ones():
    ours = Path(__file__).parent / "math" / "vectors.json"
    assert json.loads(ours.read_text()) == json.loads((SHARED / "vectors.json").read_text())
