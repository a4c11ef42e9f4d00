"""Tokens that an objective needs beside the text's: found in the tokenizer by their usual names, or appended to it.

A tokenizer that was not made for an objective serves it all the same: what it lacks gets the ids after its last one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from data_tools.objectives import FillInTheMiddle, MaskedLM, Objective, SpanCorruption
from data_tools.tokenizer import Tokenizer

NUM_SENTINELS = 100  # Raffel et al. 2020: <extra_id_0> to <extra_id_99>
NAMES: Mapping[str, tuple[str, ...]] = {
    "mask": ("[MASK]", "<mask>"),
    "begin": ("[CLS]", "<s>", "<cls>"),
    "separator": ("[SEP]", "</s>", "<sep>"),
    "padding": ("[PAD]", "<pad>"),
    "prefix": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>"),
    "middle": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>"),
    "suffix": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>"),
    **{f"mode-{mode}": (f"[{mode}]",) for mode in "RSX"},
    **{f"sentinel-{i}": (f"<extra_id_{i}>",) for i in range(NUM_SENTINELS)},
}


def roles_of(objective: Objective | None) -> tuple[str, ...]:
    """The tokens that it needs, in the order in which they would be appended."""
    if isinstance(objective, MaskedLM):
        return ("padding", "begin", "separator", "mask")
    if isinstance(objective, FillInTheMiddle):
        return ("prefix", "middle", "suffix")
    if isinstance(objective, SpanCorruption):
        modes = tuple(f"mode-{mode}" for mode in "RSX") if objective.mixture == "ul2" else ()
        return ("padding", *modes, *(f"sentinel-{i}" for i in range(NUM_SENTINELS)))
    return ()


@dataclass(frozen=True)
class SpecialTokens:
    ids: Mapping[str, int]  # by role
    appended: Mapping[str, int]  # the usual names of those that the tokenizer lacks
    text_size: int  # ids of the tokenizer itself
    vocab_size: int  # with what was appended

    def __getitem__(self, role: str) -> int:
        return self.ids[role]


def special_tokens(tokenizer: Tokenizer, objective: Objective | None) -> SpecialTokens:
    size = tokenizer.vocab_size
    ids: dict[str, int] = {}
    appended: dict[str, int] = {}
    for role in roles_of(objective):
        found = next((i for name in NAMES[role] if (i := tokenizer.id_of(name)) is not None), None)
        if found is None:
            found = size + len(appended)
            appended[NAMES[role][0]] = found
        ids[role] = found
    return SpecialTokens(ids, appended, size, size + len(appended))
