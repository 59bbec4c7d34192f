"""A skip in CI is a failure; only absent shared data may be skipped, and that is said."""

from __future__ import annotations

pytest_plugins = ["pytester"]

HOOKS = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport, pytest_terminal_summary"
TESTS = """
import pytest
from tests.shared import needs_shared

@needs_shared("no/such/file.jsonl")
def test_absent(): pass

@needs_shared()
def test_present(): pass

@pytest.mark.skip(reason="slow")
def test_marked(): pass

def test_inside(): pytest.skip("no browser")

@pytest.mark.xfail
def test_expected(): assert False
"""
MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass"


def run(pytester):
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(test_some=TESTS, test_whole=MODULE)
    return pytester.runpytest_inprocess("--continue-on-collection-errors", "-p", "no:hypothesispytest")


def test_in_ci_only_absent_shared_data_are_skipped(pytester, monkeypatch):
    monkeypatch.setenv("CI", "1")
    ran = run(pytester)
    ran.assert_outcomes(passed=1, skipped=1, failed=1, errors=2, xfailed=1)
    ran.stdout.fnmatch_lines(
        ["*not tested here*", "test_some.py::test_absent: *no shared data*/shared/no/such/file.jsonl"]
    )


def test_elsewhere_every_skip_is_a_skip(pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    run(pytester).assert_outcomes(passed=1, skipped=4, xfailed=1)
