"""What a model's family, its objective and its data must agree on: rules of `config_rules`."""

from typing import TYPE_CHECKING

from data_tools.masked_batches import NUM_SPECIAL
from data_tools.objectives import MaskedLM, PrefixLM, SpanCorruption
from data_tools.piece_dataset import SHORTEST
from pretrain.optimizer_rules import Rule

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run

OBJECTIVES = {"gpt": (None, "fim", "prefix_lm"), "bert": ("mlm",), "t5": ("span_corruption",)}


def family_is_the_models(run: "Run") -> str | None:
    stated, actual = run.config.family, run.config.model.family
    if stated is None or stated == actual:
        return None
    return f"family={stated}: the model is of family {actual}; leave family out, or name another model.preset"


def objective_fits_the_family(run: "Run") -> str | None:
    objective, family = run.config.data.objective, run.config.model.family
    kind = None if objective is None else objective.kind
    legal = OBJECTIVES[family]
    if kind in legal:
        return None
    ways = ", ".join("none (the next token)" if name is None else name for name in legal)
    return f"data.objective={kind or 'none'} with a model of family {family}: it is trained with {ways}"


def second_task_has_a_head(run: "Run") -> str | None:
    objective, bert = run.config.data.objective, run.config.model.bert
    if not isinstance(objective, MaskedLM) or bert is None or objective.second_task == "none":
        return None
    if not bert.sentence_head or bert.token_types < 2:
        return (
            f"data.objective.second_task={objective.second_task} with model.bert.sentence_head={bert.sentence_head}, "
            f"model.bert.token_types={bert.token_types}: needs the head and two types; set them, or second_task=none"
        )
    return None


def masked_text_is_plain(run: "Run") -> str | None:
    data = run.config.data
    if not isinstance(data.objective, MaskedLM):
        return None
    if data.documents != "plain" or data.mask_boundary_loss:
        return (
            f"data.documents={data.documents}, data.mask_boundary_loss={data.mask_boundary_loss} with objective mlm: "
            "these are for the next token; leave them out (a second task keeps inside documents by itself)"
        )
    needed = NUM_SPECIAL[data.objective.second_task] + SHORTEST
    if data.sequence_length < needed:
        return f"data.sequence_length={data.sequence_length}: masked text needs {needed} or more"
    return None


def corrupted_text_is_plain(run: "Run") -> str | None:
    data = run.config.data
    if not isinstance(data.objective, SpanCorruption):
        return None
    if data.documents != "plain" or data.mask_boundary_loss:
        return (
            f"data.documents={data.documents}, data.mask_boundary_loss={data.mask_boundary_loss} with objective "
            "span_corruption: these are for the next token; leave them out"
        )
    return None


def prefixes_are_seen(run: "Run") -> str | None:
    data, attention = run.config.data, run.config.model.attention
    has_prefix = isinstance(data.objective, PrefixLM)
    if has_prefix and (data.documents != "plain" or data.mask_boundary_loss):
        return (
            f"data.documents={data.documents}, data.mask_boundary_loss={data.mask_boundary_loss} with objective "
            "prefix_lm: a sample is one text there; leave them out"
        )
    if has_prefix != (attention == "prefix"):
        kind = "none" if data.objective is None else data.objective.kind
        return (
            f"data.objective={kind} with model.attention={attention}: prefix_lm and attention=prefix go together; set "
            "both, or neither"
        )
    return None


def looking_ahead_ends_within_the_sample(run: "Run") -> str | None:
    mtp, length = run.config.model.mtp, run.config.data.sequence_length
    if mtp is not None and mtp.depth >= length:
        return (
            f"model.mtp.depth={mtp.depth} with data.sequence_length={length}: there is nothing so far ahead; use a "
            f"depth of at most {length - 1}, usually 1 to 4"
        )
    return None


def replaced_tokens_are_told(run: "Run") -> str | None:
    objective, electra = run.config.data.objective, run.config.model.electra
    replaced = isinstance(objective, MaskedLM) and objective.replaced
    if replaced != (electra is not None):
        has = "set" if electra is not None else "not set"
        return (
            f"data.objective.replaced={str(replaced).lower()} with model.electra {has}: they go together; set both, or "
            "neither"
        )
    return None


def chunks_of_the_loss_are_known(run: "Run") -> str | None:
    wanted = run.config.loss.chunk_tokens
    if isinstance(wanted, int) and wanted < 1:
        return (
            f"loss.chunk_tokens={wanted}: counts tokens; use 1 or more, usually 1024 to 4096, or auto or all"
        )
    if isinstance(wanted, int) and run.config.model.electra is not None:
        return (
            f"loss.chunk_tokens={wanted} with model.electra: the generator draws its guesses from whole logits; use "
            "auto or all"
        )
    return None


OBJECTIVE_RULES: tuple[Rule, ...] = (
    family_is_the_models,
    objective_fits_the_family,
    second_task_has_a_head,
    masked_text_is_plain,
    replaced_tokens_are_told,
    corrupted_text_is_plain,
    prefixes_are_seen,
    looking_ahead_ends_within_the_sample,
    chunks_of_the_loss_are_known,
)
