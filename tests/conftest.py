"""Shared by all tests: the pool of gloo ranks, and the rule that nothing needs the network or a GPU."""

import os
from collections.abc import Iterator

import pytest

from tests.ranks import RankPool

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test run: ``ranks.run(task, world_size, *args)``."""
    pool = RankPool()
    yield pool
    pool.close()
