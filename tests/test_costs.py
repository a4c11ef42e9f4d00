"""The budget of `make test`, and the time limits that follow the machine."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import patience
from tests.costs import CPU_S, Meter, cpu_s, uncounted, verdict
from tests.patience import patient_s


def test_above_the_budget_the_most_expensive_are_named_first() -> None:
    by_test_s = {f"test_{number}": float(number) for number in range(1, 21)}
    text, is_within = verdict(by_test_s, cpu_slowness=1.0, budget_s=209.0)
    assert not is_within and "210 s" in text
    lines = text.splitlines()[1:]
    assert [line.split()[-1] for line in lines] == [f"test_{number}" for number in range(20, 10, -1)]


def test_a_slower_cpu_has_the_same_budget() -> None:
    assert not verdict({"one": 300.0}, cpu_slowness=1.0, budget_s=200.0)[1]
    text, is_within = verdict({"one": 300.0}, cpu_slowness=2.0, budget_s=200.0)
    assert is_within and "cost 150 s" in text


def test_a_test_costs_what_its_processes_compute(pytestconfig: pytest.Config) -> None:
    meter = Meter(pytestconfig)
    meter.pytest_runtest_logstart()
    wrapper = meter.pytest_runtest_makereport()
    next(wrapper)
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    report = pytest.TestReport("id", ("", 0, ""), {}, "passed", None, "call")
    with pytest.raises(StopIteration):
        wrapper.send(report)
    ((name, spent_s),) = report.user_properties
    assert name == CPU_S and spent_s >= 0.3


def test_a_kernel_that_compiles_is_no_tests_cost() -> None:
    before_s = cpu_s()
    compiler = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    with uncounted():
        compiler.wait()
    assert cpu_s() - before_s < 0.25


def test_a_suite_above_its_budget_fails(tmp_path: Path) -> None:
    """The whole way: a session of pytest with the meter, on a budget of nothing."""
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent(
            """
            from tests import costs

            costs.verdict.__kwdefaults__["budget_s"] = 0.0

            def pytest_configure(config):
                config.pluginmanager.register(costs.Meter(config))
            """
        )
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\nmarkers = thorough: x\n")
    (tmp_path / "test_it.py").write_text("def test_it():\n    sum(range(3_000_000))\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {"PYTHONPATH": str(Path.cwd()), "PATH": ""}
    ended = [
        subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        for words in (["-m", "not thorough"], ["-m", "not thorough", "test_it.py"])
    ]
    assert ended[0].returncode == 1 and "FAILED: tests cost" in ended[0].stdout, ended[0].stdout
    assert "test_it.py::test_it" in ended[0].stdout
    assert ended[1].returncode == 0, "a part of the suite has no budget"


def test_limits_follow_how_slow_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "3.50")
    assert patient_s(10) == 35.0
    monkeypatch.delenv(patience.VARIABLE)
    monkeypatch.setattr(patience, "measured_s", lambda: patience.REFERENCE_S / 10)
    assert patient_s(10) == 10.0, "a limit is never shorter than written"


def test_a_test_without_a_limit_has_one(request: pytest.FixtureRequest) -> None:
    assert request.config.option.timeout == patient_s(patience.DEFAULT_LIMIT_S)
