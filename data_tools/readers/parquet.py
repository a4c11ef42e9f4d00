"""One column of a Parquet file, a few thousand rows at a time."""

from collections.abc import Iterator

import pyarrow
from pyarrow.parquet import ParquetFile

from data_tools.documents import MISSING_FIELD, UNREADABLE, Block, no_field, skipped
from data_tools.readers.source import ReadOptions, Source

ROWS_PER_BLOCK = 512


def blocks(source: Source, options: ReadOptions) -> Iterator[Block]:
    """Rows of the text column; a file that pyarrow cannot read is one block that says so."""
    row = 1
    try:
        with ParquetFile(source.name) as table:
            names = table.schema_arrow.names
            if options.text_field not in names:
                detail = no_field(options.text_field, names)
                yield skipped(source.name, 1, MISSING_FIELD, detail, count=table.metadata.num_rows)
                return
            bytes_per_row = source.num_bytes / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=ROWS_PER_BLOCK, columns=[options.text_field]):
                values = batch.column(0).to_pylist()
                yield Block(source.name, row, "values", values, int(bytes_per_row * len(values)))
                row += len(values)
    except (pyarrow.ArrowException, OSError) as error:
        yield skipped(source.name, row, UNREADABLE, str(error).splitlines()[0])
