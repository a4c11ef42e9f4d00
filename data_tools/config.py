"""What a run says about its data: corpora and weights, split, tokenizer, sequence length, seed.

Facts only, frozen.  Nothing here looks at a disk, so a run file can be checked where there is no corpus.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from data_tools.errors import DataError
from data_tools.objectives import MaskedLM, Objective, SpanCorruption
from data_tools.span_corruption import lengths

SPLIT_PARTS = ("train", "valid", "test")
VALID_FROM_SPLIT, TEST_FROM_SPLIT = "valid", "test"


class CorpusRef(BaseModel):
    """One tokenised corpus (``PREFIX.bin`` and ``PREFIX.idx``) and its share of a blend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, allow_inf_nan=False)

    @field_validator("weight")
    @classmethod
    def _weight_is_a_share(cls, weight: float) -> float:
        if weight < 0:
            raise ValueError(
                f"weight={weight} is negative: use a positive share, or 0 to leave the corpus out"
            )
        return weight


def _as_refs(value: Any) -> Any:
    """``"a"``, ``["a", "b"]``, ``[{"path": "a", "weight": 2}]`` and one such mapping all mean corpora."""
    if isinstance(value, str | dict | CorpusRef):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


def _make_a_blend(refs: tuple[CorpusRef, ...]) -> tuple[CorpusRef, ...]:
    if not refs:
        raise ValueError("no corpus is named: give a prefix that `megaloom prepare --out PREFIX` wrote")
    if not any(ref.weight for ref in refs):
        paths = ", ".join(ref.path for ref in refs)
        raise ValueError(f"weight=0 for every corpus ({paths}): give at least one a positive weight")
    for ref in refs:
        if sum(other.path == ref.path for other in refs) > 1:
            raise ValueError(
                f"path={ref.path} is named twice in one blend: name it once, with the sum as weight"
            )
    return refs


Corpora = Annotated[tuple[CorpusRef, ...], BeforeValidator(_as_refs), AfterValidator(_make_a_blend)]


def _off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare ``off`` as false."""
    return "off" if value is False else value


class DataConfig(BaseModel):
    """The ``data`` section of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Corpora
    # The split's second and third part are the sets "valid" and "test"; named sets come beside them.
    validation: dict[str, Corpora] = {}
    test: dict[str, Corpora] = {}
    split: str = (
        "98,2,0"  # train, valid, test in any scale; contiguous parts of each train corpus, by documents
    )
    tokenizer: str | None = None  # None: the one that the corpora's manifests carry
    sequence_length: int = Field(gt=0)
    objective: Objective | None = None  # None: the next token
    documents: Literal["plain", "reset"] = "plain"  # reset: attention and positions restart at each document
    mask_boundary_loss: bool = (
        False  # no loss where a document's last token would predict the next one's first
    )
    seed: int = 1234
    cache: str | None = None  # folder of the document orders; None: .index-cache beside the first corpus
    cache_scope: Literal["auto", "shared", "per-node"] = "auto"
    # Hashes of the corpora: of the indices and some blocks of the data at the start and of the rest while the run
    # trains (sampled), of all before it starts (full), of none (off).  A resumed run may have another value.
    verify: Annotated[Literal["sampled", "full", "off"], BeforeValidator(_off_is_a_word)] = "sampled"

    def prefixes(self) -> tuple[str, ...]:
        """The corpora of all sets, each once, without those of weight 0."""
        groups = (self.train, *self.validation.values(), *self.test.values())
        return tuple(dict.fromkeys(ref.path for refs in groups for ref in refs if ref.weight))

    @field_validator("split", mode="before")
    @classmethod
    def _split_is_three_shares(cls, split: Any) -> Any:
        if isinstance(split, list | tuple):
            split = ",".join(map(str, split))
        if isinstance(split, str):
            parse_split(split)
        return split

    @model_validator(mode="after")
    def _spans_fit(self) -> "DataConfig":
        if isinstance(self.objective, SpanCorruption):
            try:
                lengths(self.objective, self.sequence_length)
            except DataError as fault:
                raise ValueError(str(fault)) from None
        if isinstance(self.objective, MaskedLM) and self.sequence_length < self.objective.smallest_length:
            raise ValueError(
                f"sequence_length={self.sequence_length}: too short for mlm with "
                f"second_task={self.objective.second_task}; use {self.objective.smallest_length} or more"
            )
        return self

    @model_validator(mode="after")
    def _names_do_not_collide(self) -> "DataConfig":
        _, valid, test = parse_split(self.split)
        for part, share, sets in (
            (VALID_FROM_SPLIT, valid, self.validation),
            (TEST_FROM_SPLIT, test, self.test),
        ):
            if share and part in sets:
                raise ValueError(
                    f"{part!r} is both a named set and a part of split={self.split}: rename the set, "
                    f"or give that part of the split 0"
                )
        return self


def parse_split(split: str) -> tuple[float, float, float]:
    """``"98,2,0"`` -> (0.98, 0.02, 0.0).

    Raises:
        ValueError: the text is not up to three shares, of which the first is positive.
    """
    advice = f"split={split!r} must be train,valid,test shares such as 98,2,0"
    words = split.split(",")
    try:
        shares = [float(word) for word in words]
    except ValueError:
        raise ValueError(advice) from None
    if len(shares) > len(SPLIT_PARTS):
        raise ValueError(f"{advice}: there are {len(shares)} numbers, at most 3 are known")
    if not all(0 <= share < float("inf") for share in shares) or not shares[0] > 0:
        raise ValueError(f"{advice}: shares must be finite and not negative, the first above 0")
    train, valid, test = shares + [0.0] * (len(SPLIT_PARTS) - len(shares))
    total = train + valid + test
    return train / total, valid / total, test / total
