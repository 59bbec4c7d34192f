"""Shared fixtures; a skip in CI is a failure, save where ../shared does not lie beside the checkout."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.models_made import make_model
from tests.postgres import new_database, server
from tests.shared import ABSENT
from tests.toy import make_toy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A toy with a known answer: see `tests.toy`."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def mesh():
    from trueup.engine.mesh import Mesh

    return Mesh.from_env("cpu")


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: call(folder, *arguments) -> (exit code, stdout, stderr)."""

    from trueup.cli import main

    def run(folder: Path, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["trueup", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server, started for these tests."""
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def place(request, tmp_path):
    """Where a store may be: a path, then a URL."""
    if request.param == "sqlite":
        return tmp_path / "deep" / "preferences.sqlite"
    return new_database(request.getfixturevalue("postgres"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return failed_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return failed_if_skipped((yield))


def failed_if_skipped(report):
    allowed = hasattr(report, "wasxfail") or ABSENT in str(report.longrepr)
    if report.skipped and os.environ.get("CI") and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter):
    """Says what a checkout without ../shared has not tested, which no failure tells."""
    untested = [r for r in terminalreporter.stats.get("skipped", []) if ABSENT in str(r.longrepr)]
    if untested:
        terminalreporter.section("not tested here")
    for report in untested:
        terminalreporter.line(f"{report.nodeid}: {report.longrepr[2]}")
