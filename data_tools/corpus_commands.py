"""`megaloom data`: look at, join and check corpora that `megaloom prepare` made."""

import sys
import time
from typing import Annotated

import typer

from data_tools import merge as merging
from data_tools import show
from data_tools import verify as verifying
from data_tools.corpus import Corpus
from data_tools.documents import Skips
from data_tools.errors import DataError
from data_tools.show_objective import KINDS, samples
from data_tools.summary import print_summary
from data_tools.tokenizer import load_tokenizer

FAULTS_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="a corpus, without .bin or .idx")]


@app.command()
def inspect(
    prefix: Prefix,
    document: Annotated[
        list[int] | None, typer.Option(metavar="N", help="show document N, counted from 0; may be repeated")
    ] = None,
    first: Annotated[int, typer.Option(min=0, help="without --document: show so many of the first ones")] = 1,
    chars: Annotated[int, typer.Option(min=1, help="show at most so many characters of each")] = 400,
    tokenizer: Annotated[
        str | None, typer.Option(help="to decode with; by default the one saved with the corpus")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(KINDS), help="show --first samples as this objective makes them instead"
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="with --objective: of a sample")] = 64,
) -> None:
    """Show a corpus: counts, a histogram of document lengths, documents as text."""
    if objective is not None and document is not None:
        raise DataError(f"--document={document} with --objective: samples are not documents; use --first")
    if objective is not None:
        lines = samples(prefix, objective, count=first, length=sequence_length, tokenizer=tokenizer)
        for line in lines:
            print(line)
        return
    corpus = Corpus(prefix)
    numbers = list(range(min(first, corpus.index.num_documents))) if document is None else document
    for line in show.statistics(corpus):
        print(line)
    print()
    for line in show.histogram(corpus.index.document_lengths()):
        print(line)
    if numbers:
        print()
        decoder = load_tokenizer(tokenizer) if tokenizer else corpus.tokenizer()
        for line in show.documents(corpus, decoder, numbers, max_chars=chars):
            print(line)


@app.command()
def merge(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX", help="the corpora to join, in order")],
    out: Annotated[str, typer.Option(metavar="PREFIX", help="where the joint corpus goes")],
    force: Annotated[bool, typer.Option("--force", help="replace whatever corpus --out holds")] = False,
) -> None:
    """Join corpora of one tokenizer into one."""
    started_s = time.monotonic()
    try:
        manifest = merging.merge(prefixes, out, force=force)
    except KeyboardInterrupt:
        print(f"interrupted: no corpus was written to {out}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    if manifest is None:
        num_tokens = Corpus(out).index.num_tokens
        print(f"merged {len(prefixes)} corpora without manifests into {out}: {num_tokens:,} tokens")
    else:
        print_summary(out, manifest, Skips(), was_there=False, elapsed_s=time.monotonic() - started_s)


@app.command()
def verify(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX", help="the corpora to check")],
    tokenizer: Annotated[
        str | None, typer.Option(help="checks ids against its vocabulary; by default the manifest's")
    ] = None,
) -> None:
    """Check corpora, byte by byte: one line per fault and exit code 1, or "ok" and 0."""
    num_faults = 0
    for prefix in prefixes:
        found = list(verifying.faults(prefix, tokenizer=tokenizer))
        num_faults += len(found)
        for line in found or ["ok"]:
            print(f"{prefix}: {line.removeprefix(f'corpus={prefix}: ')}")
    if num_faults:
        raise typer.Exit(FAULTS_EXIT_CODE)


def main(argv: list[str]) -> None:
    """Run ``megaloom data`` with these words."""
    app(args=argv, prog_name="megaloom data")
