"""Reference traces that are recorded once each."""

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.parity import Trace
from tests.parity.record import record_raw
from tests.ranks import RankPool
from tests.runs import tiny

OneProcess = Callable[..., Trace]


@pytest.fixture(scope="session")
def one_process(ranks: RankPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    """``one_process(steps, model__tie_embeddings=False, ...)``: the trace of a single process, ZeRO 0, kept."""
    kept: dict[Any, Trace] = {}
    out = tmp_path_factory.mktemp("reference")

    def trace(steps: int, **changes: Any) -> Trace:
        key = (steps, *sorted(map(str, changes.items())))
        if key not in kept:
            kept[key] = ranks.run(
                record_raw, 1, tiny(corpus, out, **{"deepspeed": "zero0.json", **changes}), steps
            )[0]
        return kept[key]

    return trace
