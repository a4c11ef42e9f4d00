"""What a sample asks of the model, as a run file says it (``data.objective``); none: the next token.

Facts only, like `config`; `masking` does the work.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _refuse_unheard(facts: _Facts, names: set[str], key: str, heard: bool) -> None:
    """A value that another makes idle, and that is not the default one, was meant to do something."""
    for name in sorted(names):
        value = getattr(facts, name)
        if not heard and value != type(facts).model_fields[name].default:
            raise ValueError(
                f"{name}={value} with {key}={getattr(facts, key)}: has no effect; leave one of them out"
            )


class MaskedLM(_Facts):
    """Fill in what is masked (Devlin et al. 2019, arXiv:1810.04805, section 3.1)."""

    kind: Literal["mlm"] = "mlm"
    share: float = Field(default=0.15, gt=0, lt=1)  # of the text's tokens that are asked for
    mask_share: float = Field(default=0.8, ge=0, le=1)  # of those: replaced by the mask
    random_share: float = Field(default=0.1, ge=0, le=1)  # and by any token; the rest stay as they are
    unit: Literal["token", "word", "span"] = "token"  # word: whole words; span: runs of words (SpanBERT)
    span_p: float = Field(default=0.2, gt=0, lt=1)  # lengths are geometric (Joshi et al. 2020, section 3.1)
    span_max: int = Field(default=10, ge=1)  # words
    # After one text a second: the next or any other (BERT), or two neighbours, maybe swapped (ALBERT, section 3.1).
    second_task: Literal["none", "next_sentence", "sentence_order"] = "none"
    # A generator's guesses are put in place of the masks, and the model tells them from what stood there (ELECTRA).
    replaced: bool = False
    short_share: float = Field(default=0.1, ge=0, le=1)  # with a second task: samples of any smaller length

    @property
    def smallest_length(self) -> int:
        """Tokens of the shortest sample: two of each text where there are two, and the special ones around them."""
        return 3 if self.second_task == "none" else 7

    @model_validator(mode="after")
    def _shares_fit(self) -> "MaskedLM":
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share}: together above 1; lower one"
            )
        return self

    @model_validator(mode="after")
    def _all_is_heard(self) -> "MaskedLM":
        _refuse_unheard(self, {"span_p", "span_max"}, "unit", self.unit == "span")
        _refuse_unheard(self, {"short_share"}, "second_task", self.second_task != "none")
        return self


class FillInTheMiddle(_Facts):
    """Documents cut in three, the middle last (Bavarian et al. 2022, arXiv:2207.14255, section 3)."""

    kind: Literal["fim"] = "fim"
    share: float = Field(default=0.5, ge=0, le=1)  # of the documents that are rearranged
    spm_share: float = Field(default=0.5, ge=0, le=1)  # of those: suffix, prefix, middle; else prefix first


class PrefixLM(_Facts):
    """A part that is seen both ways, and the rest predicted (Raffel et al. 2020, arXiv:1910.10683, section 3.2.3)."""

    kind: Literal["prefix_lm"] = "prefix_lm"


class SpanCorruption(_Facts):
    """Spans replaced by sentinels, and asked for (Raffel et al. 2020, section 3.1.4); UL2's mixture of denoisers."""

    kind: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    mean_span: float = Field(default=3.0, ge=1)
    mixture: Literal["t5", "ul2"] = "t5"  # ul2: seven denoisers (Tay et al. 2022, arXiv:2205.05131, table 1)
    target_length: int | None = Field(default=None, gt=1)  # None: what the inputs' spans need

    @model_validator(mode="after")
    def _all_is_heard(self) -> "SpanCorruption":
        _refuse_unheard(self, {"noise_density", "mean_span"}, "mixture", self.mixture == "t5")
        return self


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[
    Annotated[MaskedLM | FillInTheMiddle | PrefixLM | SpanCorruption, Field(discriminator="kind")],
    BeforeValidator(_named),
]
