"""From what a user names (files, folders, a dataset, ``stdlib``) to sources in a fixed order, then to tasks.

The order of sources is the order of documents in the corpus, so it never depends on a directory's listing:
folders are read recursively, sorted by path.
"""

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.documents import Block
from data_tools.errors import DataError
from data_tools.readers.source import BLOCK_BYTES, HUB_PREFIX, ReadOptions, Source

STDLIB = "stdlib"
MAX_BLOCKS_PER_TASK = 4096


class Reader(NamedTuple):
    """A module by name, and its functions.

    Loaded when an input asks for it, because datasets and pyarrow are slow to import, and they and zstandard
    are not needed by those who have plain text.
    """

    module: str
    blocks: str = "blocks"  # (source, options) -> blocks
    data_files: str | None = None  # (source) -> the files that hold it, where that is not its name

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), name)


READERS = {
    "plain": Reader("data_tools.readers.plain"),
    "gzip": Reader("data_tools.readers.plain", blocks="gzip_blocks"),
    "zst": Reader("data_tools.readers.zst"),
    "parquet": Reader("data_tools.readers.parquet"),
    "hub": Reader("data_tools.readers.hub", data_files="data_files"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zst"}
TEXT_SUFFIXES, JSON_SUFFIXES, PARQUET_SUFFIX = (".txt",), (".jsonl", ".ndjson"), ".parquet"
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX)
KINDS = ".txt, .jsonl (both also .gz or .zst), .parquet, a folder of these, hf:NAME[:CONFIG]:SPLIT, stdlib"

# Not the library itself: installed packages, tests with deliberately broken sources, generated data.
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Every input that ``inputs`` name, in order."""
    sources = [source for word in inputs for source in _sources_of(word)]
    if not sources:
        raise DataError(f"inputs are missing: give {KINDS}")
    return sources


def read_blocks(sources: Sequence[Source], options: ReadOptions) -> Iterator[Block]:
    """The blocks of all sources, one after another."""
    for source in sources:
        reader = READERS[source.reader]
        try:
            yield from reader.function(reader.blocks)(source, options)
        except OSError as error:
            raise DataError(
                f"input={source.name} cannot be read ({error.strerror or error}): mend or leave it out"
            ) from None


def data_files(source: Source) -> list[str]:
    """The files on disk that hold a source, for their checksums."""
    reader = READERS[source.reader]
    return [source.name] if reader.data_files is None else reader.function(reader.data_files)(source)


def read_tasks(sources: Sequence[Source], options: ReadOptions) -> Iterator[tuple[Block, ...]]:
    """Blocks in groups of about ``BLOCK_BYTES``: the unit of work, whatever the number of workers."""
    group: list[Block] = []
    weight_bytes = 0
    for block in read_blocks(sources, options):
        group.append(block)
        weight_bytes += _weight_bytes(block)
        if weight_bytes >= BLOCK_BYTES or len(group) == MAX_BLOCKS_PER_TASK:
            yield tuple(group)
            group, weight_bytes = [], 0
    if group:
        yield tuple(group)


def _weight_bytes(block: Block) -> int:
    if block.form == "values":
        return sum(len(value) for value in block.payload if isinstance(value, str))
    return 0 if block.form == "skipped" else len(block.payload)


def _sources_of(word: str) -> list[Source]:
    if word == STDLIB:
        return _stdlib_sources(Path(sysconfig.get_path("stdlib")))
    if word.startswith(HUB_PREFIX):
        return [Source(word, "hub")]
    path = Path(word).expanduser()
    if path.is_dir():
        return _folder_sources(path)
    if not path.exists():
        raise DataError(f"input={word} does not exist: give {KINDS}")
    source = _file_source(path)
    if source is None:
        raise DataError(
            f"input={word}: no reader for {path.suffix or 'a file without suffix'!r}; there are {KINDS}"
        )
    return [source]


def _file_source(path: Path) -> Source | None:
    reader = COMPRESSIONS.get(path.suffix, "plain")
    suffix = path.suffix if reader == "plain" else path.with_suffix("").suffix
    if suffix not in KNOWN_SUFFIXES or (suffix == PARQUET_SUFFIX and reader != "plain"):
        return None
    reader = "parquet" if suffix == PARQUET_SUFFIX else reader
    return Source(str(path), reader, path.stat().st_size, is_json=suffix in JSON_SUFFIXES)


def _folder_sources(folder: Path) -> list[Source]:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [Source(str(folder), "hub")]
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(path) for path in folder.iterdir() if path.is_dir()))
        raise DataError(f"input={folder} is a saved dataset with several splits: name one of {splits}")
    found = [_file_source(path) for path in _files_below(folder)]
    sources = [source for source in found if source is not None]
    if not sources:
        raise DataError(
            f"input={folder} has no file that can be read ({len(found)} of other kinds): give {KINDS}"
        )
    return sources


def _files_below(folder: Path, *, without: frozenset[str] = frozenset()) -> list[Path]:
    """Files below ``folder``, sorted by path, none of them hidden or in a folder named in ``without``."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    found = [path for path in found if path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _stdlib_sources(folder: Path) -> list[Source]:
    """In the order of a hash of their paths: by name, the split's last part would be all of one package."""
    paths = [path for path in _files_below(folder, without=STDLIB_LEFT_OUT) if path.suffix == ".py"]
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())
    sources = [
        Source(str(path), "plain", path.stat().st_size, one_document=True, group=STDLIB) for path in paths
    ]
    return [source for source in sources if source.num_bytes]  # packages often have an empty __init__.py
