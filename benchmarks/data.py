"""How fast text becomes tokens and tokens become batches, against the plainest code that does the same.

    python -m benchmarks.data [--text-mb 8] [--repeats 5] [--need-samples-per-s 40] [--documents 10000000]

`prepare` is compared per worker with a loop over the same tokenizer on one core (two ways to write that loop; the
ratio is to the faster), on the Python standard library's sources as JSON lines.  Its time includes starting
the workers, hashing the inputs and syncing the corpus to disk.  The loader is compared with what a run needs, and what
a start checks (the index, hashes of blocks, ids) with reading the same.
Variants take turns, so that a busy machine slows all of them alike; medians are shown.  The rate per CPU second
counts all processes of a variant and hardly depends on what else the machine does.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tokenizers
import typer
from rich.console import Console
from rich.table import Table

from data_tools.block_hashes import BLOCK_BYTES, block_hash
from data_tools.config import CorpusRef, DataConfig
from data_tools.corpora import find_sources
from data_tools.index_check import index_faults
from data_tools.indexed import IndexedReader, write_index
from data_tools.loader import StepShape
from data_tools.prepare import Recipe, prepare
from data_tools.tokenizer_training import train_tokenizer
from data_tools.training_data import open_data

Action = Callable[[], object]

END = "<|endoftext|>"
LOADER_STEPS = 100
BATCH_DOCUMENTS = 1000
TARGET_PER_WORKER, TARGET_LOADER = 0.9, 20.0


class Rate(NamedTuple):
    """Amounts of work, of text or of samples."""

    per_s: float
    per_cpu_s: float


def main(
    text_mb: Annotated[float, typer.Option(help="text to tokenise in each measurement")] = 8.0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    vocab_size: Annotated[int, typer.Option(help="of the BPE tokenizer that is trained first")] = 8192,
    sequence_length: Annotated[
        int, typer.Option(help="of the loader's samples; the demo run's by default")
    ] = 256,
    micro_batch_size: Annotated[int, typer.Option()] = 8,
    need_samples_per_s: Annotated[
        float, typer.Option(help="what the demo run takes, all ranks together")
    ] = 40.0,
    documents: Annotated[int, typer.Option(min=1, help="of the index that is checked")] = 10_000_000,
) -> None:
    """Measure and print three tables."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for the plain loops, as for each worker
    with tempfile.TemporaryDirectory() as folder:
        texts = _write_texts(Path(folder), text_mb)
        tokenizer = str(Path(folder) / "bpe.json")
        train_tokenizer(texts, vocab_size=vocab_size).save(tokenizer)
        text_bytes = sum(len(text.encode()) for text in texts)
        Console().print(_prepare_table(Path(folder), tokenizer, text_bytes, repeats=repeats))
        shape = StepShape(micro_batch_size, num_micro_batches=4, dp_rank=0, dp_size=2)
        Console().print(
            _loader_table(
                Path(folder), shape, sequence_length, repeats=repeats, need_per_s=need_samples_per_s
            )
        )
        Console().print(_checks_table(Path(folder), shape, sequence_length, documents, repeats=repeats))


def _write_texts(folder: Path, text_mb: float) -> list[str]:
    """The standard library's sources, as often as needed, as JSON lines."""
    library = [Path(source.name).read_text(errors="replace") for source in find_sources(["stdlib"])]
    texts: list[str] = []
    size = 0
    while size < text_mb * 1e6:
        text = library[len(texts) % len(library)]
        texts.append(text)
        size += len(text)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def _prepare_table(folder: Path, tokenizer: str, text_bytes: int, *, repeats: int) -> Table:
    source = folder / "in.jsonl"
    cores = len(os.sched_getaffinity(0))
    plain: dict[str, Action] = {
        "plain loop, encode": lambda: _plain_loop(source, tokenizer, folder / "plain.bin"),
        "plain loop, encode_batch": lambda: _plain_batches(source, tokenizer, folder / "plain.bin"),
    }
    ours: dict[str, Action] = {
        f"prepare, {count} worker{'s' if count > 1 else ''}": partial(
            _prepare, source, tokenizer, folder, count
        )
        for count in sorted({1, cores})
    }
    measured = _interleaved(plain | ours, text_bytes / 1e6, repeats=repeats)
    fastest = max(measured[name].per_s for name in plain)
    thriftiest = max(measured[name].per_cpu_s for name in plain)
    workers = dict.fromkeys(plain, 1) | dict(zip(ours, sorted({1, cores}), strict=True))
    table = Table(
        "tokenising",
        "MB/s",
        "per worker",
        "ratio",
        "MB per CPU s",
        "ratio",
        title=f"{text_bytes / 1e6:.0f} MB",
    )
    for name, rate in measured.items():
        per_worker = rate.per_s / workers[name]
        table.add_row(
            name,
            f"{rate.per_s:.2f}",
            f"{per_worker:.2f}",
            f"{per_worker / fastest:.2f}",
            f"{rate.per_cpu_s:.2f}",
            f"{rate.per_cpu_s / thriftiest:.2f}",
        )
    table.caption = f"ratios are to the faster plain loop; target {TARGET_PER_WORKER} per worker"
    return table


def _loader_table(
    folder: Path, shape: StepShape, sequence_length: int, *, repeats: int, need_per_s: float
) -> Table:
    corpus = CorpusRef(path=str(folder / "corpus"))
    data = open_data(DataConfig(train=(corpus,), sequence_length=sequence_length))
    num_samples = LOADER_STEPS * shape.micro_batch_size * shape.num_micro_batches

    def read() -> None:
        loader = data.train.loader(shape)
        for _ in range(LOADER_STEPS):
            next(loader)
        loader.close()

    rate = _interleaved({"loader": read}, num_samples, repeats=repeats)["loader"]
    table = Table("loading", "samples/s", f"ratio to {need_per_s:.0f}/s", title=f"sequence {sequence_length}")
    table.add_row("one rank", f"{rate.per_s:,.0f}", f"{rate.per_s / need_per_s:.0f}")
    table.caption = f"target {TARGET_LOADER:.0f} times what the demo run needs"
    return table


def _checks_table(
    folder: Path, shape: StepShape, sequence_length: int, documents: int, *, repeats: int
) -> Table:
    """CPU seconds of what is checked at a start, and in each batch."""
    index = _large_index(folder / "large", documents)
    corpus = CorpusRef(path=str(folder / "corpus"))
    dataset = open_data(DataConfig(train=(corpus,), sequence_length=sequence_length)).train.dataset
    numbers = range(shape.micro_batch_size)

    def gather() -> np.ndarray:
        return np.stack([dataset.read(number).tokens for number in numbers])

    tokens, blocks = gather(), memoryview(bytes(64 * BLOCK_BYTES))
    actions: dict[str, Action] = {
        f"index of {documents:,} documents": lambda: list(index_faults(index)),
        "hashes of 64 blocks": lambda: [
            block_hash(blocks[at : at + BLOCK_BYTES]) for at in range(0, len(blocks), BLOCK_BYTES)
        ],
        "10,000 batches gathered": lambda: [gather() for _ in range(10_000)],
        "10,000 batches' ids": lambda: [dataset.check_ids(tokens, numbers) for _ in range(10_000)],
    }
    table = Table(
        "checking", "CPU s", title=f"batches of {shape.micro_batch_size} x {sequence_length + 1} ids"
    )
    for name, rate in _interleaved(actions, 1.0, repeats=repeats).items():
        table.add_row(name, f"{1 / max(1e-9, rate.per_cpu_s):.3f}")
    return table


def _large_index(prefix: Path, documents: int) -> IndexedReader:
    """Of documents that have a length, and no text."""
    lengths = np.random.default_rng(0).integers(1, 60, documents, dtype=np.int32)
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(
            stream, dtype=np.dtype(np.uint16), lengths=lengths, document_indices=np.arange(documents + 1)
        )
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    return IndexedReader(prefix)


def _interleaved(actions: dict[str, Action], amount: float, *, repeats: int) -> dict[str, Rate]:
    """Median rates of ``amount`` of work; the actions take turns."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            started_s, cpu_s = time.perf_counter(), _cpu_s()
            action()
            spans[name].append((time.perf_counter() - started_s, _cpu_s() - cpu_s))
    return {
        name: Rate(*(amount / max(1e-9, statistics.median(column)) for column in zip(*rows, strict=True)))
        for name, rows in spans.items()
    }


def _cpu_s() -> float:
    """CPU time of this process and of its workers that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def _prepare(source: Path, tokenizer: str, folder: Path, workers: int) -> None:
    prepare(Recipe((str(source),), tokenizer), str(folder / "corpus"), num_workers=workers, force=True)


def _plain_loop(source: Path, tokenizer: str, out: Path) -> None:
    pieces = tokenizers.Tokenizer.from_file(tokenizer)
    end = pieces.token_to_id(END)
    with open(source) as lines, open(out, "wb") as stream:
        for line in lines:
            ids = pieces.encode(json.loads(line)["text"], add_special_tokens=False).ids
            np.array([*ids, end], dtype=np.uint16).tofile(stream)


def _plain_batches(source: Path, tokenizer: str, out: Path) -> None:
    pieces = tokenizers.Tokenizer.from_file(tokenizer)
    end = pieces.token_to_id(END)
    with open(source) as lines, open(out, "wb") as stream:
        texts = [json.loads(line)["text"] for line in lines]
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            for item in pieces.encode_batch(texts[start : start + BATCH_DOCUMENTS], add_special_tokens=False):
                np.array([*item.ids, end], dtype=np.uint16).tofile(stream)


if __name__ == "__main__":
    typer.run(main)
