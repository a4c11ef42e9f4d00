"""Whether a new run may begin with the weights of a checkpoint (`checkpoint.weights_from`)."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from data_tools.training_data import TrainingData
from model_providers.config import ModelConfig
from pretrain.checkpoint import store
from pretrain.checkpoint.manifest import Damage, verified_text
from pretrain.checkpoint.resume_rules import RUN_FILE, Change, Rule, changes
from pretrain.checkpoint.state import model_facts
from pretrain.config_io import Run
from pretrain.errors import RunError
from pretrain.run_file import parse_yaml

TOKENIZER = "tokenizer"  # in checkpoint.allow_changed
KEY = "checkpoint.weights_from"
REMADE = ("moe", "mtp", "ffn_hidden_size")  # by `checkpoint.upcycle`


def check_source(run: Run, folder: Path, data: TrainingData | None = None) -> None:
    """Refuse weights that mean something else in this run, naming both sides.

    ``checkpoint.allow_changed`` names facts that are meant to change: a larger rotary base for longer contexts, say.
    Shapes and names are compared again, tensor by tensor, when the weights are read.
    """
    named = f"{KEY}={run.config.checkpoint.weights_from}"
    try:
        theirs = _model_of(folder)
    except Damage as damage:
        raise RunError(f"{named}: damaged ({damage}); name another checkpoint") from None
    ours = run.config.model
    _check_experts(theirs, ours, is_upcycled=run.config.checkpoint.upcycle, named=named)
    left_out = REMADE if run.config.checkpoint.upcycle else ()
    before, now = ({"model": _facts(model, left_out)} for model in (theirs, ours))
    found = [change for change in changes(RUN_FILE, before, now) if change.rule is Rule.REFUSED]
    allowed = set(run.config.checkpoint.allow_changed)
    _refuse([change for change in found if change.key not in allowed], named)
    if data is not None and TOKENIZER not in allowed:
        _check_tokenizer(folder, data, named)
    idle = sorted(allowed - {change.key for change in found} - {TOKENIZER})
    if idle:
        raise RunError(
            f"checkpoint.allow_changed=[{idle[0]}]: the checkpoint has the same value; leave it out"
        )


def is_readable(folder: Path) -> bool:
    """Whether its run file is what the manifest says; the ranks pass a damaged checkpoint over."""
    try:
        return bool(verified_text(folder, store.CONFIG))
    except Damage:
        return False


def _model_of(folder: Path) -> ModelConfig:
    raw = parse_yaml(verified_text(folder, store.CONFIG), folder / store.CONFIG)
    return ModelConfig(**raw.get("model", {}))


def _facts(model: ModelConfig, left_out: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in model_facts(model).items() if key not in left_out}


def _refuse(found: list[Change], named: str) -> None:
    if found:
        told = ", ".join(str(change) for change in found)
        keys = ", ".join(change.key for change in found)
        raise RunError(
            f"{named}: the weights were trained in another model: {told}; put that back; or, where the change is meant "
            f"and changes no shape, add checkpoint.allow_changed=[{keys}]"
        )


def _check_tokenizer(folder: Path, data: TrainingData, named: str) -> None:
    place = folder / store.TOKENIZER
    if not place.is_dir():
        return
    try:
        theirs = load_tokenizer(str(place))
    except DataError as fault:
        raise RunError(f"{named}: its {fault}") from None
    if theirs.fingerprint != data.tokenizer.fingerprint:
        raise RunError(
            f"{named}: its tokenizer ({theirs.vocab_size} ids) is not that of the corpora ({data.tokenizer.vocab_size} "
            f"ids): the same id is another word. Prepare the corpora with {place}; or, where the change is meant, add "
            f"checkpoint.allow_changed=[{TOKENIZER}]"
        )


def _check_experts(theirs: ModelConfig, ours: ModelConfig, *, is_upcycled: bool, named: str) -> None:
    """Experts from a dense model, or a dense one from experts."""
    if theirs.moe is None and ours.moe is not None and not is_upcycled:
        raise RunError(
            f"{named}: a dense model, and this one has model.moe; with checkpoint.upcycle=true each expert begins as a "
            "copy of its MLP"
        )
    if theirs.moe is not None and is_upcycled:
        raise RunError(f"{named}: it has experts already; leave checkpoint.upcycle out")
    if theirs.moe is not None and ours.moe is None:
        raise RunError(f"{named}: it has experts, and this model has none; give it their model.moe")
