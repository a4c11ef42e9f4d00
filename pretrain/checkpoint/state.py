"""Everything that must survive a stop besides tensors, as one value.

There is no random state in it: every step's random streams are seeded from (seed, step, coordinates), and data
order is a function of (data seed, sample number), so two integers bring both back.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from model_providers.config import ModelConfig
from pretrain.checkpoint import store
from pretrain.config_io import Run
from pretrain.config_rules import AUTO_SCHEDULE
from pretrain.errors import RunError
from pretrain.nested import leaves
from pretrain.optimizer_facts import canonical, galore_params
from pretrain.run_file import read_yaml

FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands, and what it must not differ in when it goes on."""

    step: int  # optimizer steps done
    consumed_samples: int
    tokens: int
    layout: dict[str, Any]  # tp, pp, dp, zero stage, where layers lie: DeepSpeed's files fit no other
    model: dict[str, Any]
    data_fingerprint: str
    next_samples: str  # hash of the samples that come next
    seed: int
    optimizer: dict[str, Any] | None = None  # what its states fit; None in older checkpoints
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "RunState":
        raw = json.loads(path.read_text("utf-8"))
        if raw.get("format") != FORMAT:
            raise RunError(f"{path}: format {raw.get('format')}, this version reads {FORMAT}")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})


def layout_of(run: Run) -> dict[str, Any]:
    """What DeepSpeed's files depend on."""
    layout = run.layout
    pipeline = {"chunks": layout.chunks, "placement": layout.placement, "stages": list(run.stage_bounds)}
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "sequence_parallel": int(layout.sequence_parallel),
        **({"ep": layout.ep, "etp": layout.expert_tp} if layout.ep > 1 else {}),
        "zero_stage": run.zero_stage,
        **(pipeline if layout.pp > 1 else {}),
    }


def optimizer_of(run: Run) -> dict[str, Any]:
    """What its states depend on."""
    optimizer = run.config.optimizer
    kind = canonical(optimizer.type)
    shape = {"rank": galore_params(optimizer.params).rank} if kind == "GaLore" else {}
    return {"type": kind, "decays": optimizer.weight_decay > 0, **shape}


# Of a model's facts those that neither change a weight's shape nor what it means: a run may go on with others.
FREE_TO_CHANGE = {
    "hidden_dropout",
    "attention_dropout",
    "init_std",
    "scale_residual_init",
    "moe.aux_loss",
    "moe.sequence_aux_loss",
    "moe.global_aux_loss",
    "moe.z_loss",
    "moe.jitter",
    "moe.capacity_factor",
    "moe.drop",
    "moe.pad_to_capacity",
    "moe.router_dtype",
    "mtp.loss_weight",
}

BIAS_RATE = "moe.bias_update_rate"  # above 0 there is a bias, at 0 there is none


def model_of(run: Run) -> dict[str, Any]:
    return json.loads(run.config.model.model_dump_json())


def check_fits(state: RunState, run: Run, folder: Path) -> None:
    """Refuse to go on with another layout or model, naming both sides."""
    differing = _differences(state.layout, layout_of(run))
    if differing:
        raise RunError(
            f"checkpoint {folder} was written with {_told(state.layout)}, this run has "
            f"{_told(layout_of(run))}: optimizer states fit only the layout that wrote them. Start the run "
            f"in the old layout; or keep the weights alone with checkpoint.weights_from={folder} "
            "checkpoint.resume=never and another name"
        )
    if state.optimizer is not None and _differences(state.optimizer, optimizer_of(run)):
        raise RunError(
            f"checkpoint {folder} was written with {_optimizer_told(state.optimizer)}, this run has "
            f"{_optimizer_told(optimizer_of(run))}: its states fit no other. Put that back; or keep the weights alone "
            f"with checkpoint.weights_from={folder} checkpoint.resume=never and another name"
        )
    theirs = json.loads(ModelConfig(**state.model).model_dump_json())  # an older one may lack newer facts
    differing = [
        (key, before, now)
        for key, before, now in _differences(dict(leaves(theirs)), dict(leaves(model_of(run))))
        if key not in FREE_TO_CHANGE and not (key == BIAS_RATE and before and now)
    ]
    if differing:
        parts = ", ".join(f"model.{key}={ours!r} (checkpoint: {theirs!r})" for key, theirs, ours in differing)
        raise RunError(
            f"checkpoint {folder} holds another model: {parts}; put that back; or start a run with another name, "
            f"which may take what fits with checkpoint.weights_from={folder}"
        )


def _optimizer_told(facts: dict[str, Any]) -> str:
    rank = f" optimizer.params.rank={facts['rank']}" if "rank" in facts else ""
    return f"optimizer.type={facts['type']}{rank}" + ("" if facts["decays"] else " optimizer.weight_decay=0")


def check_before_start(run: Run) -> None:
    """What can be told of checkpoints without a rank: raises the `RunError` with which the ranks would refuse."""
    resume = run.config.checkpoint.resume
    own = store.checkpoints(run.folder / "checkpoints")
    folder = own[0] if own and resume != "never" else None
    if resume not in ("auto", "never") and folder is None:
        folder = store.checkpoint_in(Path(resume))
    is_chosen_later = run.config.layout.schedule == AUTO_SCHEDULE  # the ranks choose what fits the checkpoint
    if folder is not None and not is_chosen_later and (state := _readable(folder / store.STATE)) is not None:
        check_fits(state, run, folder)
    source = run.config.checkpoint.weights_from
    if source is not None and folder is None:
        _check_source(run, store.wanted(source, key="checkpoint.weights_from"))


def _readable(path: Path) -> RunState | None:
    """None if it is damaged: the ranks pass over it."""
    try:
        return RunState.read(path)
    except (OSError, ValueError, KeyError):
        return None


def _check_source(run: Run, folder: Path) -> None:
    """Experts from a dense model, or a dense one from experts."""
    path = folder / store.CONFIG
    if not path.is_file():
        return
    theirs, ours = read_yaml(path).get("model", {}).get("moe"), run.config.model.moe
    named = f"checkpoint.weights_from={run.config.checkpoint.weights_from}"
    if theirs is None and ours is not None and not run.config.checkpoint.upcycle:
        raise RunError(
            f"{named}: a dense model, and this one has model.moe; with checkpoint.upcycle=true each expert begins as a "
            "copy of its MLP"
        )
    if theirs is not None and run.config.checkpoint.upcycle:
        raise RunError(f"{named}: it has experts already; leave checkpoint.upcycle out")
    if theirs is not None and ours is None:
        raise RunError(f"{named}: it has experts, and this model has none; give it their model.moe")


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted(set(theirs) | set(ours))
    return [(key, theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)]


def _told(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())
