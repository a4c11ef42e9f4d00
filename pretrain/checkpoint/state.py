"""Everything that must survive a stop besides tensors, as one value.

There is no random state in it: every step's random streams are seeded from (seed, step, coordinates), and data
order is a function of (data seed, sample number), so a few integers bring both back.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.training_data import TrainingData
from model_providers.config import ModelConfig
from pretrain.checkpoint.manifest import Damage, verified_text
from pretrain.checkpoint.store import STATE
from pretrain.config_io import Run
from pretrain.errors import RunError
from pretrain.redaction import redacted

FORMAT = 2
SAMPLES_COMPARED = 8  # of those that come next, when a run resumes


class RunState(BaseModel):
    """Where a run stands, and the facts of the run that came there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = FORMAT
    step: int  # optimizer steps done
    consumed_samples: int
    consumed_tokens: int
    layout: dict[str, Any]  # tp, pp, dp, zero stage, where layers lie: DeepSpeed's files fit no other
    data_fingerprint: str
    next_samples: str  # hash of the samples that come next
    tokenizer: str  # its fingerprint
    run: dict[str, Any]  # the run file with all defaults
    deepspeed: dict[str, Any]  # the JSON with everything filled in, and no secrets

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def make_state(
    run: Run, data: TrainingData, *, step: int, consumed_samples: int = 0, consumed_tokens: int = 0
) -> RunState:
    """What a checkpoint after ``step`` steps must remember."""
    return RunState(
        step=step,
        consumed_samples=consumed_samples,
        consumed_tokens=consumed_tokens,
        layout=layout_of(run),
        data_fingerprint=data.fingerprint(),
        next_samples=data.next_samples_hash(consumed_samples, num_samples=SAMPLES_COMPARED),
        tokenizer=data.tokenizer.fingerprint,
        run=facts_of(run),
        deepspeed=json_facts_of(run),
    )


def read_state(folder: Path) -> RunState:
    """Of a checkpoint whose files are what its manifest says.

    Raises:
        Damage: the state is missing or was changed.
        RunError: it is whole, and of another version.
    """
    return parse_state(verified_text(folder, STATE), folder)


def parse_state(text: str, folder: Path) -> RunState:
    """What `RunState.to_json` wrote."""
    try:
        raw = json.loads(text)
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise RunError(
                f"checkpoint {folder}: its state has format={found}, this version reads {FORMAT}; go on with the "
                "version that wrote it, or keep the weights alone with checkpoint.weights_from"
            )
        return RunState.model_validate(raw)
    except (ValueError, RecursionError, ValidationError) as fault:
        first = str(fault).splitlines()[0]
        raise RunError(f"checkpoint {folder}: {STATE} is not a run's state ({first})") from None


def readable_state(folder: Path) -> RunState | None:
    """None if it is damaged: the ranks pass such a checkpoint over."""
    try:
        return read_state(folder)
    except Damage:
        return None


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


def facts_of(run: Run) -> dict[str, Any]:
    """The run file with all defaults, as JSON keeps it."""
    facts: dict[str, Any] = json.loads(run.config.model_dump_json())
    return {**facts, "model": model_facts(run.config.model)}


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """With the widths that follow from others where they are not stated: stated or not, they are the same model."""
    facts: dict[str, Any] = json.loads(model.model_dump_json())
    widths = {
        "num_kv_heads": model.num_kv_heads or model.num_attention_heads,
        "head_dim": model.head_width,
        "ffn_hidden_size": model.ffn_width,
    }
    return {**facts, **widths}


def json_facts_of(run: Run) -> dict[str, Any]:
    """The JSON, without secrets."""
    facts: dict[str, Any] = json.loads(json.dumps(redacted(run.deepspeed)))
    return facts
