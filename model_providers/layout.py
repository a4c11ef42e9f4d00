"""Who sits where: how many ranks share a tensor, a pipeline and a batch, and which rank has which
coordinates.

Ranks are numbered with tensor fastest and pipeline slowest, which is megatron-core's ``tp-cp-ep-dp-pp`` and
DeepSpeed's (pipe, data, model) alike, so one numbering serves both libraries.

The ranks of one pipeline stage, tp x dp of them, share out experts in an order of their own: expert tensor fastest,
then expert, then copies of the same experts (MoE Parallel Folding, Liu et al. 2025, arXiv:2504.14960; megatron-core's
expert rank generator).
"""

import math
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from model_providers.config import ModelConfig
from model_providers.errors import ModelError

AXES = ("tp", "dp", "pp")  # fastest first


class Coordinates(NamedTuple):
    tp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    etp: int
    ep: int
    edp: int


class TensorPlace(NamedTuple):
    """Which share of each parameter a rank holds: of dense ones by tp, of experts by ep and etp."""

    tp: int = 1
    tp_rank: int = 0
    etp: int = 1
    etp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    @property
    def expert_shares(self) -> int:
        return self.ep * self.etp

    @property
    def expert_share(self) -> int:
        return self.ep_rank * self.etp + self.etp_rank


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
    ep: int = Field(default=1, gt=0)  # ranks that share out the experts
    etp: int | None = Field(default=None, gt=0)  # ranks that share one expert's matrices; None: as tp
    dispatcher: Literal["alltoall", "allgather", "hierarchical"] = (
        "alltoall"  # how tokens come to their experts
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        """Copies of each expert."""
        return self.tp * self.dp // (self.expert_tp * self.ep)

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

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """The same rank as its stage's experts see it."""
        within = rank % (self.tp * self.dp)
        return ExpertCoordinates(
            etp=within % self.expert_tp,
            ep=within // self.expert_tp % self.ep,
            edp=within // (self.expert_tp * self.ep),
        )

    def tensor_place(self, rank: int) -> TensorPlace:
        expert = self.expert_coordinates(rank)
        return TensorPlace(
            tp=self.tp,
            tp_rank=self.coordinates(rank).tp,
            etp=self.expert_tp,
            etp_rank=expert.etp,
            ep=self.ep,
            ep_rank=expert.ep,
        )

    def expert_groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ in ``axis`` of their expert coordinates only; "copy" is etp x ep together."""
        assert axis in ("etp", "ep", "edp", "copy"), axis
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.expert_coordinates(rank)._asdict()
            for key in ("etp", "ep") if axis == "copy" else (axis,):
                place.pop(key)
            groups.setdefault((rank // (self.tp * self.dp), *place.values()), []).append(rank)
        return list(groups.values())

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


def layout_problems(
    model: ModelConfig, layout: Layout, sequence_length: int, target_length: int | None = None
) -> list[str]:
    """Why ``model`` cannot be cut by ``layout``, one sentence each; empty when it can."""
    problems = []
    tp, kv = layout.tp, model.kv_heads if model.mla is None else model.num_attention_heads
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
    if model.electra is not None and (model.electra.generator_heads % tp or model.generator.ffn_width % tp):
        problems.append(
            f"layout.tp={tp}: does not divide model.electra.generator_heads={model.electra.generator_heads} or the "
            f"generator's MLP of {model.generator.ffn_width}; choose one of {_divisors(model.electra.generator_heads)}"
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
    if layout.shards_sequence and target_length is not None and target_length % tp:
        problems.append(
            f"data.objective.target_length={target_length}: sequence parallelism shards the decoder's tokens, and "
            f"layout.tp={tp} must divide it; use {-(-target_length // tp) * tp}, or layout.sequence_parallel=false"
        )
    if model.position_embedding == "learned" and sequence_length > model.max_sequence_length:
        problems.append(
            f"data.sequence_length={sequence_length}: the learned positions end at model.max_sequence_length="
            f"{model.max_sequence_length}; raise that, or use rotary positions"
        )
    problems += expert_problems(model, layout)
    stages = model.num_plan_layers
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


def expert_problems(model: ModelConfig, layout: Layout) -> list[str]:
    """Why the experts of ``model`` cannot be shared out; empty when they can, or when there are none."""
    moe, tp, ep, etp = model.moe, layout.tp, layout.ep, layout.expert_tp
    if moe is None:
        stated = [f"layout.ep={ep}"] * (ep > 1) + [f"layout.etp={layout.etp}"] * (layout.etp not in (None, 1))
        return (
            [f"{', '.join(stated)}: model.moe is not set, so there are no experts; leave it out"]
            if stated
            else []
        )
    if tp > 1 and not layout.sequence_parallel:
        return [
            f"layout.tp={tp} with experts: tokens are dispatched by sequence shards; use layout.sequence_parallel=true"
        ]
    if ep == 1 and etp != tp:
        return [
            f"layout.etp={etp} with layout.ep=1: nobody would sum the gradients of experts over tp={tp}; leave etp "
            "out, or use layout.ep > 1"
        ]
    problems = []
    if moe.num_experts % ep:
        problems.append(
            f"layout.ep={ep}: does not divide model.moe.num_experts={moe.num_experts}; choose one of "
            f"{_divisors(moe.num_experts)}"
        )
    if moe.ffn_hidden_size % etp:
        problems.append(
            f"layout.etp={etp}: does not divide model.moe.ffn_hidden_size={moe.ffn_hidden_size}; choose one of "
            f"{_divisors(moe.ffn_hidden_size)}"
        )
    if (tp * layout.dp) % (etp * ep):
        fitting = [n for n in _divisors(moe.num_experts) if (tp * layout.dp) % (etp * n) == 0]
        way_out = f"choose layout.ep among {fitting}" if fitting else "use layout.etp=1"
        if etp > 1 and fitting in ([], [1]):
            way_out = "use layout.etp=1, or more ranks"
        problems.append(
            f"layout.etp={etp} x layout.ep={ep}: must divide tp x dp = {tp} x {layout.dp} ranks of a stage; {way_out}"
        )
    elif (etp * ep) % tp:
        problems.append(
            f"layout.etp={etp} x layout.ep={ep}: must be a multiple of layout.tp={tp}, or copies of an expert would "
            f"lie within a tensor group; use layout.etp={tp}, or layout.ep={tp // math.gcd(tp, etp)} or a multiple"
        )
    if moe.shared_ffn_hidden_size is not None and moe.shared_ffn_hidden_size % tp:
        problems.append(
            f"layout.tp={tp}: does not divide model.moe.shared_ffn_hidden_size={moe.shared_ffn_hidden_size}"
        )
    return problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
