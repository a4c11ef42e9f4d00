"""Who sits where: how many ranks share a tensor, a pipeline and a batch, and which rank has which
coordinates.

Ranks are numbered with tensor fastest and pipeline slowest, which is megatron-core's ``tp-cp-ep-dp-pp`` and
DeepSpeed's (pipe, data, model) alike, so one numbering serves both libraries.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from model_providers.config import ModelConfig
from model_providers.errors import ModelError

AXES = ("tp", "dp", "pp")  # fastest first


class Coordinates(NamedTuple):
    tp: int
    dp: int
    pp: int


class Layout(BaseModel):
    """Sizes of the tensor, pipeline and data axes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    dp: int = Field(default=1, gt=0)
    sequence_parallel: bool = (
        False  # norms and dropout on sequence shards (Korthikanti et al. 2022, arXiv:2205.05198)
    )
    chunks: int = Field(default=1, gt=0)  # runs of layers on each pipeline rank
    placement: Literal["loop", "v"] = "loop"  # where they live; v: down the ranks and back up

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def virtual_stages(self) -> int:
        return self.pp * self.chunks

    @property
    def loss_stage(self) -> int:
        """The pipeline coordinate of the ranks that compute the loss."""
        return 0 if self.placement == "v" else self.pp - 1

    @property
    def shards_sequence(self) -> bool:
        """Sequence parallelism in effect: with tp=1 there is nothing to shard over."""
        return self.sequence_parallel and self.tp > 1

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise ModelError(f"rank={rank}: outside the layout's {self.world_size} ranks (tp x dp x pp)")
        return Coordinates(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def rank(self, *, tp: int = 0, dp: int = 0, pp: int = 0) -> int:
        sizes = {"tp": self.tp, "dp": self.dp, "pp": self.pp}
        for axis, index in (("tp", tp), ("dp", dp), ("pp", pp)):
            if not 0 <= index < sizes[axis]:
                raise ModelError(
                    f"{axis}={index}: outside the layout, which has {axis}={sizes[axis]}; count from 0"
                )
        return tp + self.tp * (dp + self.dp * pp)

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ in ``axis`` only, each in the order of that coordinate."""
        if axis not in AXES:
            raise ModelError(f"axis={axis}: unknown; choose one of {', '.join(AXES)}")
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)._asdict()
            place.pop(axis)
            groups.setdefault(tuple(place.values()), []).append(rank)
        return list(groups.values())


def layout_problems(model: ModelConfig, layout: Layout, sequence_length: int) -> list[str]:
    """Why ``model`` cannot be cut by ``layout``, one sentence each; empty when it can."""
    problems = []
    tp, kv = layout.tp, model.kv_heads
    if model.num_attention_heads % tp:
        problems.append(
            f"layout.tp={tp}: does not divide model.num_attention_heads={model.num_attention_heads}; choose one of "
            f"{_divisors(model.num_attention_heads)}"
        )
    elif kv % tp and tp % kv:
        problems.append(
            f"layout.tp={tp}: must divide model.num_kv_heads={kv} or be a multiple of it; choose one of {_divisors(kv)}"
        )
    if model.ffn_width % tp:
        problems.append(
            f"layout.tp={tp}: does not divide model.ffn_hidden_size={model.ffn_width}; choose layout.tp or "
            "model.ffn_hidden_size to fit"
        )
    if model.vocab_size is not None and model.padded_vocab_size % tp:
        problems.append(
            f"layout.tp={tp}: does not divide the padded vocabulary of {model.padded_vocab_size}; "
            f"set model.pad_vocab_to_multiple_of to a multiple of {tp}"
        )
    if layout.shards_sequence and sequence_length % tp:
        problems.append(
            f"data.sequence_length={sequence_length}: sequence parallelism shards it, and layout.tp={tp} "
            f"must divide it; use {sequence_length // tp * tp or tp}, or layout.sequence_parallel=false"
        )
    if model.position_embedding == "learned" and sequence_length > model.max_sequence_length:
        problems.append(
            f"data.sequence_length={sequence_length}: the learned positions end at model.max_sequence_length="
            f"{model.max_sequence_length}; raise that, or use rotary positions"
        )
    stages = model.num_layers + 3  # embedding, blocks, final norm, head
    if layout.virtual_stages > stages:
        chunked = f" x layout.chunks={layout.chunks}" if layout.chunks > 1 else ""
        most = (
            f"layout.chunks={stages // layout.pp}"
            if layout.chunks > 1 and stages >= layout.pp
            else f"layout.pp={stages}"
        )
        problems.append(
            f"layout.pp={layout.pp}{chunked}: the model has {stages} layers to share out; use {most} or fewer"
        )
    return problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
