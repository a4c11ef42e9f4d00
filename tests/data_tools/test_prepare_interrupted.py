"""`megaloom prepare` killed in the middle, for real: what it leaves, whom it leaves, and what running it again does."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_tools.prepare import Recipe, prepare
from tests.data_tools.making import REPOSITORY, words, write_jsonl
from tests.patience import patient_s

# Small blocks, so that there is an early first one to wait for; the corpus does not depend on their size.
PROGRAM = """
import sys
from data_tools import corpora, prepare
from data_tools.readers import plain
corpora.BLOCK_BYTES = plain.BLOCK_BYTES = 1 << 16
prepare.main(sys.argv[1:])
"""
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def big_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    return write_jsonl(folder / "in.jsonl", [words(number, count=1000) for number in range(250)])


@pytest.fixture(scope="module")
def uninterrupted(big_input: Path, bpe_file: str) -> Path:
    prefix = big_input.parent / "uninterrupted"
    prepare(Recipe((str(big_input),), bpe_file), str(prefix), num_workers=0)
    return prefix


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGINT to all"])
def test_an_interrupted_run_leaves_nothing_finished_and_no_workers_and_can_be_repeated(
    tmp_path: Path, big_input: Path, uninterrupted: Path, bpe_file: str, how: str
) -> None:
    out = tmp_path / "c"
    words_of = [str(big_input), "--tokenizer", bpe_file, "--out", str(out), "--workers", "2"]
    mark = uuid.uuid4().hex
    process = _start(words_of, mark)
    _wait_for(lambda: _size(tmp_path / "c.partial" / "c.bin") > 0)
    if how == "SIGINT to all":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(getattr(signal, how.split()[0]))
    errors = process.communicate(timeout=patient_s(DEADLINE_S))[1].decode()
    assert not [path.name for path in tmp_path.iterdir() if path.name != "c.partial"]
    _wait_for(lambda: not list(_processes_marked(mark)))
    if how != "SIGKILL":
        assert process.returncode == 130
        assert "interrupted: no corpus was written" in errors
        assert "Traceback" not in errors
        assert not (tmp_path / "c.partial").exists()
        return  # as if it had never run
    prepare(Recipe((str(big_input),), bpe_file), str(out), num_workers=0)
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{out}{suffix}").read_bytes() == Path(f"{uninterrupted}{suffix}").read_bytes()
    assert not (tmp_path / "c.partial").exists()


def _start(arguments: list[str], mark: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": REPOSITORY, "MEGALOOM_TEST_MARK": mark}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def _wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + patient_s(DEADLINE_S)
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _processes_marked(mark: str) -> Iterator[int]:
    """Living processes that inherited the mark."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                yield int(environ.parent.name)
        except OSError:
            continue  # gone, or not ours
