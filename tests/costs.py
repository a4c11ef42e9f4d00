"""What the tests cost in seconds of CPU, against a recorded budget.

CPU seconds, not elapsed ones: a test on a busy machine takes longer and costs the same.  Counted are the test's own
process, what it started, and its ranks, but not the compiler of kernels, which runs once on a machine; divided by how
slow this CPU is at a fixed piece of work.  `make test` fails when the sum of all tests is above `BUDGET_S` (which each
new axis of layouts may raise by 40 s, and nothing else).
"""

import contextlib
import resource
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import psutil
import pytest

BUDGET_S = 1300.0  # recorded: 980 to 1,180, and about 130 for resuming under other settings, damage and doors
EVERYDAY = "not thorough"  # the tests that `make test` chooses
REFERENCE_CPU_S = 0.054  # `work_cpu_s` on the machine that the budget was recorded on
NUM_NAMED = 10
CPU_S = "cpu_s"  # of a report

_of_ranks_s: list[float] = []
_uncounted_s: list[float] = []


def add_rank(pid: int) -> None:
    """Count a rank that is about to be ended: ranks are children of the fork server, not of the test's process."""
    with contextlib.suppress(psutil.Error):
        user_s, system_s, *of_children_s = psutil.Process(pid).cpu_times()[:4]
        _of_ranks_s.append(user_s + system_s + sum(of_children_s))


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What is waited for within is not a test's cost: a kernel is compiled once for a machine."""
    before_s = cpu_s()
    yield
    _uncounted_s.append(cpu_s() - before_s)


def cpu_s() -> float:
    """CPU seconds so far: of this process, of its ended children, and of all ranks."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    counted_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return counted_s + sum(_of_ranks_s) - sum(_uncounted_s)


def work_cpu_s() -> float:
    """CPU seconds of a fixed piece of work, the least of five."""

    def once() -> float:
        started_s = time.process_time()
        sum(i * i for i in range(1_000_000))
        return time.process_time() - started_s

    return min(once() for _ in range(5))


def verdict(
    by_test_s: Mapping[str, float], *, cpu_slowness: float, budget_s: float = BUDGET_S
) -> tuple[str, bool]:
    """A line on the sum and, above the budget, the tests that cost most; whether it is within the budget."""
    total_s = sum(by_test_s.values()) / cpu_slowness
    line = f"tests cost {total_s:.0f} s of CPU (as on the reference machine), of a budget of {budget_s:.0f} s"
    if total_s <= budget_s:
        return line, True
    most = sorted(by_test_s.items(), key=lambda item: -item[1])[:NUM_NAMED]
    rows = [f"  {seconds / cpu_slowness:7.1f} s  {name}" for name, seconds in most]
    fix = "Use a cheaper level, fewer steps or fewer processes; or mark the test thorough (tests/costs.py)"
    return "\n".join([f"FAILED: {line}. {fix}. The most expensive:", *rows]), False


class Meter:
    """A plugin of pytest: every process measures its tests, and the one that reports adds them up."""

    def __init__(self, config: pytest.Config):
        self._is_worker = hasattr(config, "workerinput")  # of pytest-xdist
        self._spent_s = cpu_s()
        self._by_test_s: dict[str, float] = {}
        self._line = ""

    def pytest_runtest_logstart(self) -> None:
        self._spent_s = cpu_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        before_s, self._spent_s = self._spent_s, cpu_s()
        report.user_properties.append((CPU_S, self._spent_s - before_s))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent_s = sum(value for name, value in report.user_properties if name == CPU_S)
        self._by_test_s[report.nodeid] = self._by_test_s.get(report.nodeid, 0.0) + spent_s

    @pytest.hookimpl(tryfirst=True)  # before the terminal shows how the session ended
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config: Any = session.config
        is_whole = config.option.markexpr == EVERYDAY and not config.option.keyword
        is_whole = is_whole and config.args_source is pytest.Config.ArgsSource.TESTPATHS
        is_whole = is_whole and not config.option.collectonly
        if self._is_worker or not is_whole or session.exitstatus != pytest.ExitCode.OK:
            return
        self._line, is_within = verdict(
            self._by_test_s, cpu_slowness=max(1.0, work_cpu_s() / REFERENCE_CPU_S)
        )
        if not is_within:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._line:
            terminalreporter.write_line(self._line)
