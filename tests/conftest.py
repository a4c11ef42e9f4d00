"""Shared by all tests: the pool of gloo ranks, and the rule that nothing needs the network or a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.ranks import CPU_ONLY_ENVIRONMENT, RankPool

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile before the first test, so that no test's own time limit pays for it."""
    needed = any(item.get_closest_marker("ranks") for item in session.items)
    if needed and not session.config.option.collectonly:
        code = "from tests.conftest import compile_kernels; compile_kernels()"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **CPU_ONLY_ENVIRONMENT},
            check=True,
        )


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test run: ``ranks.run(task, world_size, *args)``."""
    pool = RankPool()
    yield pool
    pool.close()


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
