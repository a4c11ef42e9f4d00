"""The start-up benchmark follows a real run to its end, and its parts add up."""

import subprocess
import sys

import pytest

from benchmarks.startup import Timeline


def test_parts_of_a_run_add_up() -> None:
    parts_s = Timeline(1.0, 5.0, 9.0, 9.5, 9.75, 10.0, 10.5).parts_s()
    assert parts_s.pop("the whole run") == 10.5
    assert parts_s.pop("command -> first step") == 5.0
    assert sum(parts_s.values()) == pytest.approx(10.5 - (9.0 - 5.0)), "all but the steps themselves"


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_a_small_benchmark_prints_every_part() -> None:
    command = [sys.executable, "-m", "benchmarks.startup", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("megaloom --help", "--dry-run", "launch.run", "first step", "ranks ended", "megaloom ended"):
        assert part in done.stdout
