"""The reference of `megaloom parity`: whatever the layout, one process with the same micro-batches."""

from pathlib import Path
from typing import Any

import pytest

from launch.parity import one_process
from pretrain.nested import put
from pretrain.run_file import parse_words
from tests.runs import checked, tiny

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp": (4, {}),
    "tp": (4, {"layout__tp": 2, "layout__sequence_parallel": True}),
    "pp": (2, {"layout__pp": 2, "layout__chunks": 2, "layout__schedule": "interleaved"}),
    "ep": (
        4,
        {
            "model": {"preset": "tiny-moe", "vocab_size": 257},
            "layout__ep": 2,
            "layout__dispatcher": "allgather",
            "deepspeed": "moe.json",
        },
    ),
    "etp": (
        4,
        {
            "model": {"preset": "tiny-moe", "vocab_size": 257},
            "layout": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1},
            "deepspeed": "zero1.json",
        },
    ),
}


@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_reference_takes_the_same_micro_batches(
    corpus: str, out: Path, world_size: int, changes: dict[str, Any]
) -> None:
    raw = tiny(corpus, out, **changes, batch={"global_size": 16, "accumulation_steps": 2})
    run = checked(raw, world_size=world_size)
    for key, value in parse_words(one_process(run)):
        put(raw, key, value)
    reference = checked(raw, world_size=1)
    assert reference.layout.world_size == 1
    assert (reference.global_size, reference.micro_size) == (run.global_size, run.micro_size)
