"""A Hugging Face dataset: from the hub or its cache (``hf:NAME[:CONFIG]:SPLIT``), or saved to disk.

The only module that imports `datasets`, which costs a second: `corpora.READERS` loads it when asked for.
"""

from collections.abc import Iterator

from data_tools.documents import MISSING_FIELD, Block, no_field, skipped
from data_tools.errors import DataError
from data_tools.hub_access import stay_offline_if_out_of_reach
from data_tools.readers.source import HUB_PREFIX, ReadOptions, Source

OBSTACLE = stay_offline_if_out_of_reach()

import datasets  # noqa: E402  it reads whether to stay offline when it is imported

ROWS_PER_BLOCK = 512


def blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Rows of the text column."""
    rows = load(source)
    if options.text_field not in rows.column_names:
        detail = no_field(options.text_field, rows.column_names)
        yield skipped(source.name, 1, MISSING_FIELD, detail, count=len(rows))
        return
    column = rows.select_columns([options.text_field])
    for start in range(0, len(column), ROWS_PER_BLOCK):
        values = column[start : start + ROWS_PER_BLOCK][options.text_field]
        yield Block(source.name, start + 1, "values", list(values), 0)


def load(source: Source) -> datasets.Dataset:
    """The one split that ``source`` names."""
    if not source.name.startswith(HUB_PREFIX):
        return datasets.load_from_disk(source.name)
    words = source.name.removeprefix(HUB_PREFIX).split(":")
    if len(words) not in (2, 3) or not all(words):
        raise DataError(f"input={source.name}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, split = words[0], words[-1]
    config = words[1] if len(words) == 3 else None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, name, split and script errors come in a dozen unrelated classes
        said = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"{OBSTACLE}; {said}" if OBSTACLE else said
        raise DataError(
            f"input={source.name} cannot be loaded ({reason}): check the name and the split, "
            f"or download it and give its files or its saved folder"
        ) from None


def data_files(source: Source) -> list[str]:
    """The Arrow files that hold the rows, for their checksums."""
    return [entry["filename"] for entry in load(source).cache_files]
