"""Raters over HTTP at once, and a server that is killed: every acknowledged answer is there once."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_a_kill_loses_nothing_that_was_acknowledged(where, tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from tests.postgres import new_database

    store = str(tmp_path / "s.sqlite") if where == "sqlite" else new_database(request.getfixturevalue("postgres"))
    found = importlib.import_module("label").load(store, raters=8, seconds=12)
    assert found["before_the_kill"] > 10 and found["acknowledged"] > found["before_the_kill"]
    assert (found["lost"], found["twice"]) == (0, 0)
    assert found["stored"] >= found["acknowledged"]
