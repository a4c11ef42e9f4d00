"""``PREFIX.json``: where a corpus came from, which tokenizer made it, and what was left out.

It holds no time and no host, so the same inputs give the same bytes wherever and whenever they are prepared.

Format 2 adds `blocks`: hashes of both files, block by block, in the manifest itself, so that they cannot be left behind
when a corpus is copied.  They come last, as two lines of text; those of 100 GB are a line of 260 kB.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_tools.block_hashes import from_text
from data_tools.errors import DataError

FORMATS = (1, 2)


class InputRecord(BaseModel):
    """One input file, or one set of files that is named as a whole (``stdlib``)."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: int
    sha256: str
    files: int = 1


class TokenizerRecord(BaseModel):
    """Which tokenizer wrote the corpus; the tokenizer itself lies in ``PREFIX.tokenizer/``."""

    model_config = ConfigDict(frozen=True)

    spec: str
    fingerprint: str
    vocab_size: int
    end_of_document: int | None


class BlockRecord(BaseModel):
    """Hashes of blocks of ``block_bytes`` (`block_hashes`), as base64."""

    model_config = ConfigDict(frozen=True)

    algorithm: Literal["xxh3_64"] = "xxh3_64"
    block_bytes: int = Field(gt=0)
    idx: str
    bin: str

    @field_validator("idx", "bin")
    @classmethod
    def _is_text_of_hashes(cls, text: str) -> str:
        from_text(text)
        return text

    @cached_property
    def idx_hashes(self) -> bytes:
        return from_text(self.idx)

    @cached_property
    def bin_hashes(self) -> bytes:
        return from_text(self.bin)


class Manifest(BaseModel):
    """Everything that is known about a finished corpus."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1, 2] = 2
    documents: int
    tokens: int
    text_bytes: int
    dtype: str
    tokenizer: TokenizerRecord
    inputs: tuple[InputRecord, ...]
    skipped: dict[str, int]
    options: dict[str, Any]
    bin_sha256: str
    idx_sha256: str
    blocks: BlockRecord | None = None  # format 1 has none

    @model_validator(mode="after")
    def _has_what_its_format_has(self) -> "Manifest":
        if (self.format == 1) != (self.blocks is None):
            raise ValueError(f"format {self.format} {'with' if self.blocks else 'without'} hashes of blocks")
        return self

    def to_bytes(self) -> bytes:
        left_out = {"blocks"} if self.blocks is None else None
        return (self.model_dump_json(indent=2, exclude=left_out) + "\n").encode()


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def load_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a corpus, or None: corpora written by Megatron's own tools have none."""
    path = manifest_path(prefix)
    try:
        content = path.read_bytes()
        return Manifest.model_validate_json(content)
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError) and (number := _format_of(content)) not in (None, *FORMATS):
            raise DataError(
                f"manifest={path} has format {number}, known are {FORMATS[0]} and {FORMATS[1]}: it is of a newer "
                f"Megaloom; update this one, or prepare the corpus again"
            ) from None
        raise DataError(
            f"manifest={path} cannot be read ({reason}): prepare the corpus again, or delete it"
        ) from None


def _format_of(content: bytes) -> Any:
    try:
        return json.loads(content)["format"]
    except (ValueError, KeyError, TypeError):
        return None
