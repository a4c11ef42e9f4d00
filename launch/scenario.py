"""What an estimate needs to know of a run, and nothing that a cluster must have first: no corpus, no JSON, no torch.

A run file gives one scenario; a search makes thousands, so this is a plain frozen dataclass.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from model_providers.activation_memory import RecomputeMode
from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.fp8.config import Fp8Config
from model_providers.layout import Layout
from model_providers.partition import partition_by
from pretrain.config import Dtype, OptimizerConfig
from pretrain.config_io import Run
from pretrain.ds_config import Buckets, gradient_buckets
from pretrain.ds_offload import Place, SwapBuffers, offload_place, offload_ratio, swap_buffers
from pretrain.engine.schedules.catalogue import placement_of
from pretrain.engine.schedules.ops import Placement
from pretrain.fp8_te_rules import settled_fp8
from pretrain.optimizer_facts import ADAMW, OptimizerChoice, choice_of


@dataclass(frozen=True)
class Scenario:
    """A model in a layout, with what decides about memory and time."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    micro_size: int = 1  # samples of one forward pass
    num_micro_batches: int = 1  # of one rank per optimizer step
    schedule: str = "1f1b"
    zero_stage: int = 1
    dtype: Dtype = "bf16"
    gradient_dtype: Dtype = "fp32"  # in which gradients are summed over micro-batches
    recompute: RecomputeMode = "none"
    recompute_every: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)  # what selective recompute forgets
    chunk_tokens: int | None = None  # of the head and its loss; None: a micro-batch's logits are made whole
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    target_length: int | None = None  # tokens of a decoder beside an encoder
    partition: str | tuple[int, ...] = "cost"
    fused: bool = True  # attention that never writes its scores
    optimizer: OptimizerChoice = ADAMW
    fp8: Fp8Config | None = None
    offloads_activations: bool = False  # to the CPU's memory
    offload_ratio: float = 1.0  # share of the optimizer that is offloaded, where it is
    swap: SwapBuffers | None = None  # for NVMe; None: those that Megaloom's JSON files make
    buckets: Buckets | None = None  # of gradients under ZeRO; None: those that Megaloom's JSON files make

    @property
    def global_size(self) -> int:
        """Samples per optimizer step."""
        return self.micro_size * self.num_micro_batches * self.layout.dp

    @property
    def loss_tokens(self) -> int:
        """Of one micro-batch, those that a head is asked for."""
        return self.micro_size * (self.target_length or self.sequence_length)

    @property
    def tokens_per_step(self) -> int:
        return self.global_size * self.sequence_length

    @cached_property
    def placement(self) -> Placement:
        return placement_of(self.schedule, stages=self.layout.pp, chunks=self.layout.chunks)

    @cached_property
    def stage_bounds(self) -> tuple[int, ...]:
        """The first layer of each virtual stage, and the number of layers; as the run itself cuts them."""
        return _bounds(
            self.model,
            self.sequence_length,
            self.target_length,
            self.partition,
            self.layout.virtual_stages,
        )


@lru_cache(maxsize=4096)
def _bounds(
    model: ModelConfig,
    sequence_length: int,
    target_length: int | None,
    partition: str | tuple[int, ...],
    virtual_stages: int,
) -> tuple[int, ...]:
    """One cut serves all scenarios of a search that differ in other things."""
    costs = layer_costs(model, sequence_length, target_length=target_length)
    parameters, flops = [cost.parameters for cost in costs], [cost.forward_flops_per_token for cost in costs]
    return tuple(partition_by(partition, parameters, flops, virtual_stages))


def scenario_of(run: Run) -> Scenario:
    """The run as it would be trained; `layout.schedule=auto` counts as 1f1b until it has been measured."""
    config = run.config
    return Scenario(
        model=config.model,
        layout=run.layout,
        sequence_length=config.data.sequence_length,
        micro_size=run.micro_size,
        num_micro_batches=run.num_micro_batches,
        schedule="1f1b" if config.layout.schedule == "auto" else config.layout.schedule,
        zero_stage=run.zero_stage,
        dtype=config.precision.dtype,
        gradient_dtype=config.precision.accumulate,
        recompute=config.recompute.mode,
        recompute_every=config.recompute.every,
        recompute_modules=config.recompute.forgotten,
        chunk_tokens=run.chunk_tokens,
        offload_optimizer=offload_place(run.deepspeed, "offload_optimizer"),
        offload_parameters=offload_place(run.deepspeed, "offload_param"),
        target_length=config.target_length,
        partition=config.layout.partition,
        optimizer=optimizer_of(config.optimizer),
        fp8=settled_fp8(run)[0],
        offloads_activations=config.recompute.offload,
        offload_ratio=offload_ratio(run.deepspeed) or 1.0,
        swap=swap_buffers(run.deepspeed, run.largest_shard),
        buckets=gradient_buckets(run.deepspeed),
    )


def optimizer_of(config: OptimizerConfig) -> OptimizerChoice:
    return choice_of(
        config.type,
        config.params,
        weight_decay=config.weight_decay,
        decay_embeddings=config.decay_embeddings,
    )
