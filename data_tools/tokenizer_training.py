"""`megaloom tokenizer`: trains a byte-level BPE, GPT-2's kind, on any input that `megaloom prepare` reads.

Byte-level means that nothing is ever unknown: the 256 byte values are there before training starts.
The same input gives the same file.
"""

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.corpora import KINDS, find_sources, read_tasks
from data_tools.documents import Documents, Skips, nothing_left, read_documents, refuse_skips
from data_tools.errors import DataError
from data_tools.progress import Meter, progress
from data_tools.readers.source import ReadOptions, TxtDocuments
from data_tools.staging import write_whole

Result = TypeVar("Result")

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte value and the end of a document
INTERRUPTED_EXIT_CODE = 130
GIANT_CHARS = 4096
GIANT_WORD = re.compile(rf"(?<!\S)\S{{{GIANT_CHARS}}}|(?<!\s)\s{{{GIANT_CHARS}}}")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` pieces, with `END_OF_DOCUMENT` as id 0."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab-size={vocab_size} is below {SMALLEST_VOCABULARY}, the 256 bytes and {END_OF_DOCUMENT}: "
            f"use --vocab-size {SMALLEST_VOCABULARY} or more, or --tokenizer bytes, which needs no training"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_giant_words(texts), trainer)
    return tokenizer


def interruptible(work: Callable[[], Result]) -> Result:
    """Do ``work`` in a thread, so that Ctrl-C ends the wait: the library's training does not look for signals."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def _without_giant_words(texts: Iterable[str]) -> Iterator[str]:
    """Training takes time quadratic in a word's length: a run of a million letters, minutes (measured).

    Such runs are noise (encoded data, rulings), so a text that has one is cut into pieces.
    """
    for text in texts:
        if GIANT_WORD.search(text):
            yield from (text[at : at + GIANT_CHARS] for at in range(0, len(text), GIANT_CHARS))
        else:
            yield text


class TrainingText:
    """The texts of ``inputs`` up to ``limit_bytes``, with an account of what was left out."""

    def __init__(self, inputs: list[str], options: ReadOptions, *, limit_bytes: float = math.inf):
        self.skips = Skips()
        self.num_documents = self.text_bytes = 0
        self._sources, self._options, self._limit_bytes = find_sources(inputs), options, limit_bytes

    @property
    def total_bytes(self) -> int:
        return sum(source.num_bytes for source in self._sources)

    def read(self, *, strict: bool = False, meter: Meter | None = None) -> Iterator[str]:
        for task in read_tasks(self._sources, self._options):
            found = read_documents(task, text_field=self._options.text_field)
            if strict:
                refuse_skips(found.skips)
            self._count(found)
            if meter:
                read = sum(block.bytes_read for block in task)
                meter.add(bytes_read=read, text_bytes=found.text_bytes, documents=len(found.texts), tokens=0)
            yield from found.texts
            if self.text_bytes >= self._limit_bytes:
                return
        if not self.num_documents:
            raise nothing_left(self.skips)

    def _count(self, found: Documents) -> None:
        self.skips.merge(found.skips)
        self.num_documents += len(found.texts)
        self.text_bytes += found.text_bytes


def write_tokenizer(tokenizer: Tokenizer, out: Path, *, force: bool) -> None:
    """Write the JSON file; another tokenizer that is there already stays, unless ``force``."""
    data = tokenizer.to_str(pretty=True).encode()
    if out.exists() and not force and out.read_bytes() != data:
        raise DataError(f"out={out} holds another tokenizer: choose another --out, or replace it by --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, data)
    except OSError as error:
        raise DataError(f"out={out} cannot be written ({error.strerror}): choose another place") from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help=KINDS, show_default=False)],
    vocab_size: Annotated[
        int, typer.Option(help="number of pieces, the 256 bytes and the end token among them")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="where the tokenizer goes")],
    text_field: Annotated[str, typer.Option("--field", help="field or column that holds the text")] = "text",
    txt_documents: Annotated[
        TxtDocuments, typer.Option(help="what a document is in a .txt file")
    ] = TxtDocuments.FILE,
    limit_mb: Annotated[
        float | None, typer.Option(min=0, help="train on about the first so many MB of text")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first bad record")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace another tokenizer in FILE.json")] = False,
) -> None:
    """Train a byte-level BPE tokenizer; <|endoftext|> is id 0."""
    limit_bytes = math.inf if limit_mb is None else limit_mb * 1e6
    text = TrainingText(inputs, ReadOptions(text_field, txt_documents), limit_bytes=limit_bytes)
    started_s = time.monotonic()
    try:
        with progress("tokenizer: reading", total_bytes=text.total_bytes) as meter:
            texts = text.read(strict=strict, meter=meter)
            tokenizer = interruptible(lambda: train_tokenizer(texts, vocab_size=vocab_size))
    except KeyboardInterrupt:
        print(f"interrupted: {out} was not written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    write_tokenizer(tokenizer, out, force=force)
    _tell(tokenizer, text, out, asked=vocab_size, elapsed_s=time.monotonic() - started_s)


def _tell(tokenizer: Tokenizer, text: TrainingText, out: Path, *, asked: int, elapsed_s: float) -> None:
    found = tokenizer.get_vocab_size()
    print(f"trained {out}: {found:,} pieces on {text.num_documents:,} documents, ", end="")
    print(f"{text.text_bytes / 1e6:.1f} MB, in {elapsed_s:.1f} s")
    if found < asked:
        print(f"note: the text yields {found:,} pieces, not {asked:,}: give more text or ask for fewer")
    for account in text.skips.accounts():
        print(f"left out: {account}")
    print(f"next: megaloom prepare INPUT... --tokenizer {out} --out PREFIX")


def main(argv: list[str]) -> None:
    """Run ``megaloom tokenizer`` with these words."""
    app(args=argv, prog_name="megaloom tokenizer")
