"""Shared by all tests: the pool of gloo ranks, and the rule that nothing needs the network or a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import CPU_ONLY_ENVIRONMENT, RankPool
from tests.runs import make_corpus

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


BUILD = pytest.StashKey["subprocess.Popen[bytes]"]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start ranks come last: until then their kernels are being compiled."""
    items.sort(key=starts_ranks)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile beside the first tests, so that no test's own time limit pays for it."""
    if any(map(starts_ranks, session.items)) and not session.config.option.collectonly:
        code = "from tests.conftest import compile_kernels; compile_kernels()"
        session.config.stash[BUILD] = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **CPU_ONLY_ENVIRONMENT}
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if starts_ranks(item):
        assert item.config.stash[BUILD].wait() == 0, "a kernel that the tests need did not compile"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if BUILD in session.config.stash:
        session.config.stash[BUILD].terminate()


def starts_ranks(item: pytest.Item) -> bool:
    return item.get_closest_marker("ranks") is not None


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test run: ``ranks.run(task, world_size, *args)``."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small corpus of bytes."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for runs; not made yet."""
    return tmp_path / "out"


def compile_kernels() -> None:
    """DeepSpeed's kernels that the tests use; a minute or two each on a fresh machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, CPULionBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from pretrain.engine.native_builds import build_obstacle
    from pretrain.engine.preflight import libaio_is_there

    builders = [ShareMemCommBuilder(), CPUAdamBuilder(), CPULionBuilder()]
    if libaio_is_there():
        builders.append(AsyncIOBuilder())
    for builder in builders:
        obstacle = build_obstacle(builder, tell=True)
        assert obstacle is None, obstacle
