"""Shared fixtures; a skip in CI is a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.models_made import make_model
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
