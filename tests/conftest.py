"""What holds for every test: in continuous integration nothing is skipped, and what a test measured is told at the end.

A test that skips because a program is missing looks like a passed one at the end of a long log. With ``CI`` set,
each skip is a failure that says why it was skipped. An expected failure (xfail) stays what it is.

What a test gives to ``record_property("told", …)`` is printed after the tests, whichever process ran it.
"""

import os
from collections.abc import Generator

import pytest

_NOTHING_MAY_BE_SKIPPED = os.environ.get("CI", "") not in {"", "0", "false"}


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not _NOTHING_MAY_BE_SKIPPED or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{reason} (CI is set, so nothing may be skipped: install what is missing)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a module that skipped itself while it was imported into an error."""
    report = yield
    _fail_if_skipped(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what passed tests have to tell."""
    passed = terminalreporter.getreports("passed")
    told = [value for report in passed for name, value in report.user_properties if name == "told"]
    if told:
        terminalreporter.section("told by the tests")
        for line in dict.fromkeys(told):
            terminalreporter.write_line(str(line))
