"""``PREFIX.json``: where a corpus came from, which tokenizer made it, and what was left out.

It holds no time and no host, so the same inputs give the same bytes wherever and whenever they are prepared.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.errors import DataError


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


class Manifest(BaseModel):
    """Everything that is known about a finished corpus."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
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

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def load_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a corpus, or None: corpora written by Megatron's own tools have none."""
    path = manifest_path(prefix)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"manifest={path} cannot be read ({reason}): prepare the corpus again, or delete it"
        ) from None
