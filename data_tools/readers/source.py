"""What a reader is given: one input, and how the user wants text files cut."""

from dataclasses import dataclass
from enum import StrEnum

HUB_PREFIX = "hf:"


class TxtDocuments(StrEnum):
    """What one document is in a ``.txt`` file."""

    FILE = "file"
    LINE = "line"
    PARAGRAPH = "paragraph"


# Large enough that a worker's answer outweighs the trip there, small enough that Ctrl-C and the last
# worker never wait long: at 3 MB/s (GPT-2's BPE on one core, measured) a third of a second.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input: a file, or a dataset that is read as a whole."""

    name: str  # as the user would find it: a path, or hf:NAME:SPLIT
    reader: str  # key into corpora.READERS
    num_bytes: int = 0  # as stored on disk; 0 where that is not known
    is_json: bool = False
    one_document: bool = False  # whatever the user wants of .txt files
    group: str | None = None  # sources that the manifest records as one set, such as stdlib


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents."""

    text_field: str = "text"
    txt_documents: TxtDocuments = TxtDocuments.FILE
