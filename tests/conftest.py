"""Shared by all tests: the pool of gloo ranks, and the rule that nothing needs the network or a GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import costs
from tests.patience import DEFAULT_LIMIT_S, patient_s
from tests.ranks import CPU_ONLY_ENVIRONMENT, RankPool
from tests.runs import make_corpus, tiny
from tests.thorough import mark_rare

if TYPE_CHECKING:  # torch
    from pretrain.parity import Trace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


OneProcess = Callable[..., "Trace"]

# Kernels by the marker of the tests that need them; the second takes minutes, so it is left to idle cores.
BUILDS = {"ranks": "kernels()", "nvme": "os.nice(10); asynchronous_io()"}
LONGEST = ("test_readme", "test_run_on_nodes", "test_run", "test_k8s")
RUNNING = pytest.StashKey[dict[str, "subprocess.Popen[bytes]"]]()


@pytest.hookimpl(tryfirst=True)  # before pytest-timeout reads it
def pytest_configure(config: pytest.Config) -> None:
    """A test that states no limit gets one for this machine; Ctrl-C reaches what tests start."""
    # In a shell's background it is ignored, and what tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.timeout is None:
        config.option.timeout = patient_s(DEFAULT_LIMIT_S)
    config.pluginmanager.register(costs.Meter(config))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need compiled kernels come last, and of these first those that take minutes each."""
    mark_rare(items, all_collected=not any("::" in word for word in config.args))
    for item in items:
        limit = item.get_closest_marker("timeout")
        if limit is not None:
            item.add_marker(pytest.mark.timeout(patient_s(*limit.args), **limit.kwargs), append=False)
    with_ranks = {item.path for item in items if is_marked(item, "ranks")}

    def place(item: pytest.Item) -> list[Any]:
        built = [is_marked(item, marker) for marker in reversed(BUILDS)]
        return [built[0], item.path in with_ranks, item.path.stem not in LONGEST, *built[1:]]

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile beside the first tests, so that no test's own time limit pays for it."""
    session.config.stash[RUNNING] = {
        marker: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"import os; from tests.compile import *; {code}"],
            env={**os.environ, **CPU_ONLY_ENVIRONMENT},
        )
        for marker, code in BUILDS.items()
        if any(is_marked(item, marker) for item in session.items) and not session.config.option.collectonly
    }


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, build in item.config.stash[RUNNING].items():
        if is_marked(item, marker):
            with costs.uncounted():
                build.wait()
            assert build.returncode == 0, f"what tests marked {marker} need did not compile"


def pytest_sessionfinish(session: pytest.Session) -> None:
    for build in session.config.stash.get(RUNNING, {}).values():
        build.terminate()


def is_marked(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Gloo ranks, fresh ones for each task: ``ranks.run(task, world_size, *args)``."""
    return RankPool()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small corpus of bytes."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for runs; not made yet."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def one_process(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    """``one_process(steps, model__tie_embeddings=False, ...)``: the trace of a single process, ZeRO 0, kept."""
    from tests.parity.record import record_raw

    kept: dict[Any, Trace] = {}
    out = tmp_path_factory.mktemp("reference")

    def trace(steps: int, **changes: Any) -> "Trace":
        key = (steps, *sorted(map(str, changes.items())))
        if key not in kept:
            kept[key] = ranks.run(
                record_raw, 1, tiny(corpus, out, **{"deepspeed": "zero0.json", **changes}), steps
            )[0]
        return kept[key]

    return trace
