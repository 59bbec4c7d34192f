"""Imports go down only; report and help start without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "trueup"
GROUND = {"records", "config", "run", "store", "faults", "named", "agreement"}
MAY = {
    "records": set(),
    "faults": {"records"},
    "named": {"records", "faults"},
    "config": {"records"},
    "track": {"records"},
    "run": {"records", "config", "track"},
    "store": {"records"},
    "agreement": set(),
    "math": set(),
    "data": GROUND,
    "models": GROUND | {"math", "data"},
    "engine": GROUND | {"math", "data", "models"},
    "scorers": GROUND | {"math", "data", "models", "engine"},
    "judges": GROUND | {"math", "data", "models", "engine", "scorers"},
    "watch": GROUND | {"math", "data", "models", "engine", "scorers", "judges"},
    "phases": GROUND | {"math", "data", "models", "engine", "scorers", "judges", "watch"},
    "evaluate": GROUND | {"math", "data", "models", "engine", "scorers", "judges"},
    "report": GROUND,
    "label": GROUND | {"data"},
    "arena": GROUND | {"math", "data", "engine", "judges", "label", "chat", "recipe"},
    "simulate": GROUND | {"engine", "judges", "label"},
    "world": GROUND | {"engine", "models"},
    "chat": GROUND | {"data", "models", "engine"},
    "export": GROUND | {"report", "chat"},
    "ensemble": GROUND | {"math", "data", "models", "engine", "scorers", "phases"},
    "ai_feedback": GROUND | {"data", "engine", "scorers", "phases"},
    "check": GROUND | {"data", "models", "phases"},
    "init": GROUND | {"data", "models"},
    "recipe": GROUND | {"engine", "track", "world"},
    "plan": GROUND | {"data", "models", "engine", "scorers", "phases", "recipe", "world"},
    "study": {*GROUND, "recipe", "engine", "scorers", "evaluate", "report"},
    "cli": {
        *GROUND,
        "phases",
        "evaluate",
        "recipe",
        "plan",
        "study",
        "report",
        "chat",
        "export",
        "check",
        "init",
        "data",
        "world",
        "engine",
        "label",
        "arena",
        "simulate",
    },
}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, as dotted names below trueup."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "trueup" else {f"trueup.{a.name}" for a in node.names}
    return {n.removeprefix("trueup.") for n in names if n.startswith("trueup.")}


@pytest.mark.parametrize("room", sorted(MAY))
def test_imports_go_down_only(room):
    files = [SRC / f"{room}.py"] if (SRC / f"{room}.py").exists() else list((SRC / room).rglob("*.py"))
    assert files, room
    for file in files:
        for name in imported(file) - {"__version__"}:
            other = name.split(".")[0]
            assert other == room or other in MAY[room], f"{file.relative_to(SRC)} imports trueup.{name}"


def test_every_room_is_known():
    rooms = {p.stem for p in SRC.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= set(MAY)


def test_a_phase_imports_no_other_phase():
    for file in (SRC / "phases").glob("*.py"):
        assert not [n for n in imported(file) if n.startswith("phases")], file


@pytest.mark.parametrize(
    "module",
    [
        "trueup.report",
        "trueup.world",
        "trueup.recipe",
        "trueup.records",
        "trueup.store",
        "trueup.label.queue",
        "trueup.label.accounts",
        "trueup.label.client",
        "trueup.label.server",
    ],
)
def test_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC.parent)}).returncode == 0
    )
