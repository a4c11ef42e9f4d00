"""A full disk is told by its name, loses no record that it can keep, and never ends in exit code 0."""

import errno
import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch.distributed as dist

from pretrain.checkpoint import manifest, save_load, store
from pretrain.config_io import make_run
from pretrain.disks import no_space, size_told
from pretrain.loop import NotSaved
from pretrain.monitor.metrics import Record
from pretrain.monitor.sinks import JsonLines
from tests.pretrain.test_resume import eight, go_on, train
from tests.ranks import RankPool
from tests.thorough import everyday

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/run/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 2176 vs 2070"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_every_librarys_words_for_a_full_disk_are_known(fault: Exception, tmp_path: Path) -> None:
    words = no_space(fault, tmp_path)
    assert words is not None and "no space left for" in words and "free)" in words
    assert getattr(fault, "filename", None) is None or "/data/run/x" in words


def test_other_faults_are_not_called_a_full_disk() -> None:
    assert no_space(PermissionError(errno.EACCES, "Permission denied")) is None
    assert no_space(RuntimeError("shape mismatch")) is None


def test_sizes_never_read_as_nothing() -> None:
    assert [size_told(size) for size in (4096, 800_000, 2.5e6, 3e12)] == [
        "4.1 kB",
        "800 kB",
        "2.5 MB",
        "3 TB",
    ]


class Full:
    """A file on a disk with room for a few bytes, until it is cleared."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, text: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(text[: self.room])
        self.room -= taken
        return int(taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_records_wait_in_memory_until_the_disk_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resumed_step=0)
    sink.write(Record(1, {"loss": 1.0}))
    full = cast(Any, Full(sink._file, room=7))
    sink._file = full
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            sink.write(Record(step, {"loss": 1.0}))
    assert len(caplog.messages) == 1 and "no space left" in caplog.messages[0]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1], "no half line"
    full.room = 10**6
    sink.write(Record(4, {"loss": 1.0}))
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def out_of_room(raw: dict[str, Any], free: int) -> str:
    """Train where so many bytes are free; how it ends."""
    with patch.object(shutil, "disk_usage", lambda path: Usage(10**9, 0, free)):
        try:
            train(raw)
        except NotSaved as fault:
            return str(fault)
    return "saved"


@pytest.mark.ranks
def test_a_run_whose_last_state_found_no_room_does_not_end_well(
    ranks: RankPool, corpus: str, tmp_path: Path
) -> None:
    raw = eight(corpus, tmp_path, train__steps=1)
    root = tmp_path / "tiny" / "checkpoints"
    for words in ranks.run(out_of_room, 2, raw, 100_000):
        assert words.startswith(f"step 1 was NOT saved for want of room on the disk of {root}")
        assert "there is no checkpoint" in words
    assert store.checkpoints(root) == []
    assert ranks.run(out_of_room, 2, raw, 10**8)[0] == "saved"
    longer = eight(corpus, tmp_path, train__steps=2)
    assert "the last checkpoint is" in ranks.run(out_of_room, 2, longer, 100_000)[0]


def expected_and_real(raw: dict[str, Any]) -> tuple[int, int]:
    run = make_run(raw, world_size=dist.get_world_size())

    class Nowhere:
        def write(self, record: Any) -> None: ...

        def close(self) -> None: ...

    engine = go_on(run, None, Nowhere())
    expected = save_load.bytes_together(engine)
    (folder,) = store.checkpoints(run.checkpoints)
    return expected, sum(path.stat().st_size for path in manifest.files_of(folder))


@pytest.mark.ranks
@everyday("zero1", "zero3")
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"deepspeed": "zero0.json"}),
        (2, {"deepspeed": "zero1.json"}),
        (2, {"deepspeed": "zero3.json"}),
        (2, {"precision": "bf16"}),
        (2, {"layout": {"pp": 2}, "deepspeed": "pipeline.json"}),
        (2, {"layout": {"tp": 2}}),
        (2, {"deepspeed": "zero2_cpu_offload.json"}),
    ],
    ids=["zero0", "zero1", "zero3", "bf16", "pp2", "tp2", "offload"],
)
def test_the_room_for_a_first_checkpoint_is_known(
    ranks: RankPool, corpus: str, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    raw = eight(corpus, tmp_path, train__steps=1, model__hidden_size=128, **changes)
    expected, real = ranks.run(expected_and_real, world_size, raw)[0]
    assert 0.85 < expected / real < 1.35, (expected, real)
