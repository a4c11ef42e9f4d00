"""Everything that must survive a stop besides tensors, as one value.

There is no random state in it: every step's random streams are seeded from (seed, step, coordinates), and data
order is a function of (data seed, sample number), so two integers bring both back.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pretrain.config_io import Run
from pretrain.errors import RunError

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
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "RunState":
        raw = json.loads(path.read_text("utf-8"))
        if raw.get("format") != FORMAT:
            raise RunError(f"{path}: format {raw.get('format')}, this version reads {FORMAT}")
        return cls(**{field.name: raw[field.name] for field in fields(cls)})


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
    differing = _differences(state.model, model_of(run))
    if differing:
        parts = ", ".join(f"model.{key}={ours!r} (checkpoint: {theirs!r})" for key, theirs, ours in differing)
        raise RunError(
            f"checkpoint {folder} holds another model: {parts}; put the model section back, or use another "
            "name"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted(set(theirs) | set(ours))
    return [(key, theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)]


def _told(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout.items())
