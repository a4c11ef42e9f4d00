"""From a user's word for a tokenizer to one of the `tokenizers` library; only this file knows the layouts."""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_tools.errors import DataError
from data_tools.hub_access import stay_offline_if_out_of_reach

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
KINDS = (
    "bytes, a tokenizer JSON, a folder, vocab.json,merges.txt, a BERT vocab.txt, or a Hugging Face hub name"
)


def read_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that ``spec`` names, as its files describe it."""
    path = Path(spec).expanduser()
    try:
        if "," in spec:
            return _byte_level_bpe(*_pair(spec))
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _word_pieces(path) if path.suffix == ".txt" else Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever a file may hold
        raise DataError(
            f"tokenizer={spec} cannot be read ({_first_line(error)}): it must be {KINDS}"
        ) from None
    if path.suffix in (".json", ".txt", ".model") or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise DataError(f"tokenizer={spec}: no such file; give {KINDS}")
    return _from_hub(spec)


def read_settings(spec: str) -> dict[str, Any]:
    """The ``tokenizer_config.json`` in the folder that ``spec`` names, or beside the file; {} without one."""
    named = Path(spec).expanduser()
    path = (named.parent if named.is_file() else named) / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(
            f"tokenizer settings {path} are broken JSON ({error}): mend or delete the file"
        ) from None
    return settings if isinstance(settings, dict) else {}
    return settings if isinstance(settings, dict) else {}


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level_bpe(folder / "vocab.json", folder / "merges.txt")
    if (folder / "vocab.txt").is_file():
        return _word_pieces(folder / "vocab.txt")
    hint = ""
    if (folder / "tokenizer.model").is_file():
        hint = "; a SentencePiece tokenizer.model becomes a tokenizer.json by transformers' save_pretrained"
    raise DataError(
        f"tokenizer={folder} holds none of {TOKENIZER_FILE}, vocab.json with merges.txt, vocab.txt{hint}: "
        f"name the tokenizer's own folder"
    )


def _pair(spec: str) -> tuple[Path, Path]:
    paths = [Path(word).expanduser() for word in spec.split(",")]
    names = sorted(path.suffix for path in paths)
    if names != [".json", ".txt"]:
        raise DataError(f"tokenizer={spec}: a pair is one vocab.json and one merges.txt, joined by a comma")
    vocab, merges = sorted(paths, key=lambda path: path.suffix)
    for path in (vocab, merges):
        if not path.is_file():
            raise DataError(f"tokenizer={spec}: no such file {path}; a pair is vocab.json,merges.txt")
    return vocab, merges


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's layout: https://github.com/openai/gpt-2/blob/master/src/encoder.py."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_pieces(vocab: Path) -> Tokenizer:
    """BERT's layout: https://github.com/google-research/bert/blob/master/tokenization.py."""
    pieces = models.WordPiece.read_file(str(vocab))
    if "[UNK]" not in pieces:
        raise DataError(f"tokenizer={vocab} is no BERT vocabulary: one token a line, [UNK] among them")
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=_lower_cases(vocab, pieces))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _lower_cases(vocab: Path, pieces: dict[str, int]) -> bool:
    """A vocab.txt does not say whether it is cased: settings beside it do, or a capital letter in it."""
    said = read_settings(str(vocab)).get("do_lower_case")
    if isinstance(said, bool):
        return said
    return not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))


def _from_hub(name: str) -> Tokenizer:
    obstacle = stay_offline_if_out_of_reach()
    if obstacle is None:
        logger.warning("tokenizer=%s is no file here: asking the Hugging Face hub for it", name)
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # network, name and file errors all arrive as bare Exception
        raise DataError(
            f"tokenizer={name}: no such file here, and the Hugging Face hub did not give it "
            f"({obstacle or _first_line(error)}); give {KINDS}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
