"""Published steps with whole configurations, as scenarios; `published.csv` has the facts and where they are printed.

What a source leaves open is assumed alike in all of its rows.  Megatron Core's table of H100s names neither micro-batch
nor chunks: all 4 samples of a rank at once where there is no pipeline, else 1, and chunks of one layer; this was chosen
with predictions at hand, so that table tests little.  Table 2 of Narayanan et al. 2021 names no chunks: 1.  Other
micro-batches that nobody names have 1 sample.  Step times that a source gives as a throughput were computed with its
own count of FLOPs.

Left out are rows that the engine cannot be asked for: fp8, context parallelism, recompute of single operators, H100s of
500 W; and those of models with shapes that their source does not state in full.
"""

import csv
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from launch import software
from launch.hardware import CLUSTERS, Cluster
from launch.scenario import Scenario
from launch.software import Software
from launch.step_time import step_time
from model_providers.config import ModelConfig
from model_providers.layout import Layout
from model_providers.moe_config import MoEConfig

TABLE = Path(__file__).with_name("published.csv")
SOFTWARE = {
    each.name: each
    for each in (
        software.MEGATRON_2021,
        software.MEGATRON_CORE,
        software.DEEPSPEED_2021,
        software.FSDP,
        software.FSDP_TRITON,
        software.MEGATRON_OVERLAPPED,
    )
}
GPT = {
    "position_embedding": "learned",
    "normalization": "layernorm",
    "activation": "gelu",
    "tie_embeddings": True,
}
FAMILIES: dict[str, dict[str, object]] = {
    "gpt": {**GPT, "linear_bias": True, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "mpt": {**GPT, "position_embedding": "none"},
    "llama": {"tie_embeddings": False},
    "mixtral": {"tie_embeddings": False},
    "glm": {
        "activation": "geglu",
        "normalization": "layernorm",
        "linear_bias": True,
        "attention": "prefix",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
}


@dataclass(frozen=True)
class Published:
    """One row: what was run, on what, with what, and how long a step took."""

    source: str
    place: str
    model: str
    scenario: Scenario
    cluster: Cluster
    software: Software
    step_s: float

    @cached_property
    def predicted_s(self) -> float:
        return step_time(self.scenario, self.cluster, software=self.software).total_s

    @property
    def error(self) -> float:
        """Of the throughput: above 0 if more was predicted than was measured."""
        return self.step_s / self.predicted_s - 1

    @property
    def group(self) -> str:
        """Source and device: one column of a comparison."""
        return f"{self.source.partition('@')[0].removeprefix('github.com/')}, {self.cluster.device.name}"

    @property
    def experiment(self) -> tuple[str, str, int, int, bool]:
        """Rows of one experiment compare configurations: the same model and length on as many devices."""
        return (
            self.group,
            self.model,
            self.scenario.layout.world_size,
            self.scenario.sequence_length,
            self.scenario.fused,
        )


def published(device: str | None = None) -> list[Published]:
    with TABLE.open(newline="") as file:
        rows = [_row(facts) for facts in csv.DictReader(file)]
    return [row for row in rows if device is None or row.cluster.name == device]


def mean_absolute_error(rows: list[Published]) -> float:
    return sum(abs(row.error) for row in rows) / len(rows)


def pairs(rows: list[Published], *, apart: float = 0.03) -> list[bool]:
    """For each two rows of an experiment whose tokens per second differ by more than ``apart``: was the order right?"""

    def speed(row: Published, step_s: float) -> float:
        return row.scenario.tokens_per_step / step_s

    right = []
    for _, same in groupby(sorted(rows, key=lambda row: row.experiment), key=lambda row: row.experiment):
        members = list(same)
        for index, one in enumerate(members):
            for other in members[index + 1 :]:
                ratio = speed(one, one.step_s) / speed(other, other.step_s)
                if abs(ratio - 1) > apart:
                    predicted = speed(one, one.predicted_s) / speed(other, other.predicted_s)
                    right.append((predicted > 1) == (ratio > 1))
    return right


def _row(facts: dict[str, str]) -> Published:
    def number(key: str) -> int:
        return int(facts[key])

    model = _model(facts)
    pp, tp = number("pp"), number("tp")
    chunks = int(facts["chunks"]) if facts["chunks"] else model.num_layers // pp
    layout = Layout(
        tp=tp,
        pp=pp,
        dp=number("gpus") // (tp * pp),
        chunks=chunks,
        ep=number("ep"),
        sequence_parallel=facts["sequence_parallel"] == "1",
    )
    scenario = Scenario(
        model=model,
        layout=layout,
        sequence_length=number("sequence_length"),
        micro_size=number("micro_size"),
        num_micro_batches=number("micro_batches"),
        schedule="interleaved" if chunks > 1 else "1f1b",
        zero_stage=number("zero"),
        dtype=facts["dtype"],  # type: ignore[arg-type]
        gradient_dtype=facts["gradient_dtype"],  # type: ignore[arg-type]
        recompute=facts["recompute"],  # type: ignore[arg-type]
        partition=_even_bounds(model, pp * chunks),
        fused=facts["fused"] == "1",
    )
    return Published(
        facts["source"],
        facts["place"],
        facts["model"],
        scenario,
        CLUSTERS[facts["device"]],
        SOFTWARE[facts["software"]],
        float(facts["step_s"]),
    )


def _model(facts: dict[str, str]) -> ModelConfig:
    numbers = {
        ours: int(facts[key])
        for ours, key in (
            ("num_layers", "layers"),
            ("hidden_size", "hidden"),
            ("num_attention_heads", "heads"),
            ("num_kv_heads", "kv_heads"),
            ("ffn_hidden_size", "ffn"),
            ("vocab_size", "vocab"),
            ("max_sequence_length", "sequence_length"),
        )
        if facts[key]
    }
    moe = None
    if facts["experts"]:
        moe = MoEConfig(
            num_experts=int(facts["experts"]),
            top_k=int(facts["top_k"]),
            ffn_hidden_size=int(facts["ffn"]),
        )
    return ModelConfig(**numbers, **FAMILIES[facts["family"]], moe=moe)  # type: ignore[arg-type]


def _even_bounds(model: ModelConfig, stages: int) -> tuple[int, ...] | str:
    """Megatron's: as many transformer layers on each stage, the embedding and the head beside the outer ones."""
    if stages == 1 or model.num_layers % stages:
        return "cost"
    each = model.num_layers // stages
    return (0, *(1 + each * stage for stage in range(1, stages)), model.num_plan_layers)
