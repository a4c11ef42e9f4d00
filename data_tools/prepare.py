"""`megaloom prepare`: text in, a tokenised corpus out.

The result is self-contained: ``PREFIX.bin`` and ``PREFIX.idx`` (Megatron's format), ``PREFIX.json`` (where it
came from) and ``PREFIX.tokenizer/`` (what made it).  Running the same command twice does the work once;
running it after a crash starts afresh, because half a corpus is never kept.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from data_tools.checksums import Checksums
from data_tools.corpora import KINDS, find_sources, read_tasks
from data_tools.corpus import Corpus
from data_tools.data_check import DataCheck
from data_tools.documents import Skips, nothing_left, refuse_skips
from data_tools.errors import DataError
from data_tools.indexed import idx_path, token_dtype
from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import Manifest, TokenizerRecord, load_manifest
from data_tools.progress import Meter, Silent, progress
from data_tools.readers.source import ReadOptions, Source, TxtDocuments
from data_tools.staging import Staging
from data_tools.summary import print_summary
from data_tools.tokenise import EncoderSpec, TokenChunk, encode_tasks
from data_tools.tokenizer import Tokenizer, load_tokenizer

# Below this much input a worker's start (about half a second) costs more than it saves.
BYTES_PER_WORKER = 4_000_000
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells count


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a corpus; how many workers make it is not part of that."""

    inputs: tuple[str, ...]
    tokenizer: str
    read: ReadOptions = field(default_factory=ReadOptions)
    end_token: str | None = None
    append_end: bool = True
    strict: bool = False

    def options(self) -> dict[str, Any]:
        """What the manifest says of it, beside the inputs and the tokenizer."""
        return {
            "field": self.read.text_field,
            "txt_documents": self.read.txt_documents.value,
            "end_of_document": self.append_end,
        }


@dataclass(frozen=True)
class Prepared:
    """What came of it."""

    manifest: Manifest
    skips: Skips
    was_there: bool  # the same corpus had been prepared before; nothing was done


def prepare(
    recipe: Recipe,
    out: str,
    *,
    num_workers: int | None = None,
    force: bool = False,
    meter: Meter | None = None,
) -> Prepared:
    """Make the corpus ``out`` unless it is there already; another corpus there is kept unless ``force``."""
    sources = find_sources(recipe.inputs)
    tokenizer = load_tokenizer(recipe.tokenizer, end_token=recipe.end_token)
    record = _tokenizer_record(recipe, tokenizer)
    if not force and (there := _corpus_there(out, recipe, sources, record)):
        return Prepared(there, Skips(), was_there=True)
    with Staging(out) as staging, Checksums(sources) as checksums:
        tokenizer.save(staging.path(".tokenizer"))
        spec = _encoder_spec(recipe, record, staging)
        chunks = encode_tasks(
            read_tasks(sources, recipe.read), spec, num_workers=_num_workers(num_workers, sources)
        )
        with closing(chunks), IndexedWriter(staging, dtype=np.dtype(spec.dtype)) as writer:
            skips, text_bytes = _write(writer, chunks, strict=recipe.strict, meter=meter or Silent())
        manifest = Manifest(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=text_bytes,
            dtype=writer.dtype.name,
            tokenizer=record,
            inputs=checksums.records(),
            skipped=skips.by_reason(),
            options=recipe.options(),
            bin_sha256=writer.bin_sha256,
            idx_sha256=writer.idx_sha256,
            blocks=writer.blocks,
        )
        staging.path(".json").write_bytes(manifest.to_bytes())
        staging.publish()
    return Prepared(manifest, skips, was_there=False)


def _write(
    writer: IndexedWriter, chunks: Iterable[TokenChunk], *, strict: bool, meter: Meter
) -> tuple[Skips, int]:
    skips, text_bytes = Skips(), 0
    for chunk in chunks:
        if strict:
            refuse_skips(chunk.skips)
        skips.merge(chunk.skips)
        writer.add(chunk.tokens, chunk.lengths)
        text_bytes += chunk.text_bytes
        meter.add(
            bytes_read=chunk.bytes_read,
            text_bytes=chunk.text_bytes,
            documents=len(chunk.lengths),
            tokens=len(chunk.tokens),
        )
    if not writer.num_documents:
        raise nothing_left(skips)
    return skips, text_bytes


def _tokenizer_record(recipe: Recipe, tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        spec=recipe.tokenizer,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document if recipe.append_end else None,
    )


def _encoder_spec(recipe: Recipe, record: TokenizerRecord, staging: Staging) -> EncoderSpec:
    return EncoderSpec(
        tokenizer=str(staging.path(".tokenizer")),
        text_field=recipe.read.text_field,
        append_end=recipe.append_end,
        dtype=token_dtype(record.vocab_size).name,
    )


def _num_workers(asked: int | None, sources: Sequence[Source]) -> int:
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if any(not source.num_bytes for source in sources):
        return cores  # a dataset, whose size is not known beforehand
    return min(cores, sum(source.num_bytes for source in sources) // BYTES_PER_WORKER)


def _corpus_there(
    out: str, recipe: Recipe, sources: Sequence[Source], record: TokenizerRecord
) -> Manifest | None:
    """The manifest of ``out`` if it is what this recipe would make; None if nothing finished is there.

    Raises:
        DataError: something else is there.
    """
    if not idx_path(out).exists():
        return None
    there = load_manifest(out)
    difference = (
        "it was not written by megaloom" if there is None else _difference(there, recipe, sources, record)
    )
    if difference:
        raise DataError(
            f"out={out} holds another corpus ({difference}): choose another --out, or replace it by --force"
        )
    corpus = Corpus(out)  # says so if the files were damaged since
    DataCheck([corpus], verify="sampled", seed=0, vocab_size=record.vocab_size).at_start()
    return there


def _difference(
    there: Manifest, recipe: Recipe, sources: Sequence[Source], record: TokenizerRecord
) -> str | None:
    if there.options != recipe.options():
        return _options_that_differ(there.options, recipe.options())
    if (there.tokenizer.fingerprint, there.tokenizer.end_of_document) != (
        record.fingerprint,
        record.end_of_document,
    ):
        return f"made with tokenizer {there.tokenizer.spec}"
    sizes = sum(source.num_bytes for source in sources)
    if sizes and sizes != sum(part.bytes for part in there.inputs):
        return "made of other inputs"  # seen without reading them
    with Checksums(sources) as checksums:
        records = checksums.records()
    if [part.sha256 for part in records] != [part.sha256 for part in there.inputs]:
        return "made of other inputs"
    return None


def _options_that_differ(there: dict[str, Any], asked: dict[str, Any]) -> str:
    if "merged" in there:
        return "made by merging"
    return "made with " + ", ".join(
        f"{name}={value}" for name, value in there.items() if asked.get(name) != value
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help=KINDS, show_default=False)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bytes, a tokenizer JSON, its folder, vocab.json,merges.txt, a BERT vocab.txt, or a hub name"
        ),
    ],
    out: Annotated[
        str,
        typer.Option(metavar="PREFIX", help="where the corpus goes: PREFIX.bin, .idx, .json, .tokenizer/"),
    ],
    text_field: Annotated[str, typer.Option("--field", help="field or column that holds the text")] = "text",
    txt_documents: Annotated[
        TxtDocuments, typer.Option(help="what a document is in a .txt file")
    ] = TxtDocuments.FILE,
    eod: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="the token that ends a document; found by its usual names"),
    ] = None,
    no_eod: Annotated[bool, typer.Option("--no-eod", help="append no end-of-document token")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="processes; 0 is none beside this one; default: one a core, fewer for small inputs"
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first bad record instead of counting it")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace whatever corpus PREFIX holds")] = False,
) -> None:
    """Tokenise text into a corpus: PREFIX.bin and .idx in Megatron's indexed format, with a manifest."""
    recipe = Recipe(
        inputs=tuple(inputs),
        tokenizer=tokenizer,
        read=ReadOptions(text_field, txt_documents),
        end_token=eod,
        append_end=not no_eod,
        strict=strict,
    )
    try:
        total_bytes = sum(source.num_bytes for source in find_sources(recipe.inputs))
        with progress("prepare", total_bytes=total_bytes) as meter:
            started_s = time.monotonic()
            prepared = prepare(recipe, out, num_workers=workers, force=force, meter=meter)
            elapsed_s = time.monotonic() - started_s
    except KeyboardInterrupt:
        print(
            f"interrupted: no corpus was written to {out}; run the same command to start again",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    print_summary(out, prepared.manifest, prepared.skips, was_there=prepared.was_there, elapsed_s=elapsed_s)


def main(argv: list[str]) -> None:
    """Run ``megaloom prepare`` with these words."""
    app(args=argv, prog_name="megaloom prepare")
