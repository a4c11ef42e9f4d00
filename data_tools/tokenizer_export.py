"""A corpus's tokenizer as transformers needs it beside a model: with the tokens that the objective appended."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from data_tools.objectives import MaskedLM, Objective, SpanCorruption
from data_tools.special_tokens import NAMES, SpecialTokens
from data_tools.tokenizer_files import SETTINGS_FILE, TOKENIZER_FILE

MASKED_WORDS = {"mask": "mask_token", "begin": "cls_token", "separator": "sep_token", "padding": "pad_token"}


def complete(
    folder: Path, objective: Objective | None, special: SpecialTokens, *, end_of_document: int | None
) -> None:
    """Rewrite the tokenizer's files in ``folder``, with the token that ends a document as ``eos_token``; ids stay what
    they were in training.
    """
    pieces = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    pieces.add_special_tokens([AddedToken(name, special=True) for name in special.appended])
    found = {name: pieces.token_to_id(name) for name in special.appended}
    assert found == dict(special.appended), "the tokenizer numbers what is appended otherwise"
    settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    end = None if end_of_document is None else pieces.id_to_token(end_of_document)
    if end is not None:
        settings["eos_token"] = end
    names = {role: _name(pieces, role, special) for role in special.ids}
    if isinstance(objective, MaskedLM):
        begin, separator = names["begin"], names["separator"]
        pieces.post_processor = TemplateProcessing(
            single=f"{begin} $A {separator}",
            pair=f"{begin} $A {separator} $B:1 {separator}:1",
            special_tokens=[(begin, special["begin"]), (separator, special["separator"])],
        )
        settings |= {word: names[role] for role, word in MASKED_WORDS.items()}
    if isinstance(objective, SpanCorruption) and end is not None:
        pieces.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, end_of_document)]
        )
        settings["pad_token"] = names["padding"]
    pieces.save(str(folder / TOKENIZER_FILE))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _name(pieces: Tokenizer, role: str, special: SpecialTokens) -> str:
    return next(name for name in NAMES[role] if pieces.token_to_id(name) == special[role])
