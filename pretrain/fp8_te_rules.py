"""What Transformer Engine's FP8 cannot do that ours can: refused where it is asked for by name, else ours is taken."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from model_providers.config import ModelConfig
from model_providers.fp8.config import Fp8Config, Recipe
from model_providers.layout import Layout
from pretrain.engine.schedules.catalogue import SPLIT_BACKWARD

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run

# Tokens and widths of operands.  Per-tensor: pytorch/utils.py, assert_dim_for_fp8_exec, and 16 bytes of each row of the
# weight gradient's operands, which are transposed; blocks: is_quantizable in pytorch/tensor/{float8_blockwise,mxfp8,
# nvfp4}_tensor.py.
TE_MULTIPLES: dict[Recipe, int] = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32, "nvfp4": 16}


class Obstacle(NamedTuple):
    what: str  # key=value
    why: str
    way_out: str


def kernels_are_torchs(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    config = run.config
    if config.kernels == "torch":
        return Obstacle("kernels=torch", "its FP8 is that of its own layers", "kernels=te or auto")
    if config.kernels == "auto" and config.precision.dtype == "fp32":
        why = "in fp32 auto takes torch's layers, and Transformer Engine's FP8 is that of its own"
        return Obstacle("kernels=auto", why, "kernels=te")
    return None


def schedule_splits_backward_passes(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    schedule = run.config.layout.schedule
    if schedule not in SPLIT_BACKWARD:
        return None
    why = "Transformer Engine's linears compute their weights' gradients at once, so nothing is left for the bubble"
    return Obstacle(f"layout.schedule={schedule}", why, "1f1b or interleaved")


def current_scaling_has_a_margin(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    if fp8.recipe != "current" or not fp8.margin:
        return None
    return Obstacle(f"fp8.margin={fp8.margin}", "Transformer Engine's current scaling leaves none", "delayed")


def experts_are_asked_for(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    if not fp8.experts:
        return None
    return Obstacle("fp8.experts=true", "its layers leave routed experts as they are", "fp8.experts=false")


def zero_3_would_keep_whole_weights(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    """Its linears save the eight-bit weight for the backward pass (pytorch/module/linear.py), whole on each rank."""
    if run.zero_stage < 3 or run.config.recompute.mode == "full":
        return None
    why = (
        "from forward to backward pass Transformer Engine keeps each weight in eight bits, whole on every rank, which "
        "is what stage 3 splits"
    )
    return Obstacle("zero_optimization.stage=3", why, "recompute=full, or stage 2")


def tokens_do_not_fill_blocks(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    """Of one sample, since an evaluation's last micro-batch may be that small; under sequence parallelism a shard."""
    layout, multiple = run.layout, TE_MULTIPLES[fp8.recipe]
    shards = layout.tp if layout.shards_sequence else 1
    lengths = {"sequence_length": run.config.data.sequence_length, "target_length": run.config.target_length}
    for name, length in lengths.items():
        if length is not None and (length // shards) % multiple:
            of_rank = f", {length // shards} on each of {shards} tensor ranks," if shards > 1 else ""
            why = f"tokens{of_rank} are no multiple of {multiple}, as {fp8.recipe} wants"
            return Obstacle(f"{name}={length}", why, f"{_above(length, multiple * shards)}")
    return None


def widths_do_not_fill_blocks(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    multiple = TE_MULTIPLES[fp8.recipe]
    for name, width in linear_widths(run.config.model, run.layout):
        if width % multiple:
            why = f"{name} is {width} wide on a rank, no multiple of {multiple}, as {fp8.recipe} wants"
            return Obstacle(f"layout.tp={run.layout.tp}", why, "a smaller tp, or other widths")
    return None


OBSTACLES: tuple[Callable[["Run", Fp8Config], Obstacle | None], ...] = (
    kernels_are_torchs,
    schedule_splits_backward_passes,
    current_scaling_has_a_margin,
    experts_are_asked_for,
    zero_3_would_keep_whole_weights,
    tokens_do_not_fill_blocks,
    widths_do_not_fill_blocks,
)


def transformer_engine_can(run: "Run") -> str | None:
    fp8 = run.config.fp8
    found = first_obstacle(run, fp8) if fp8 is not None and fp8.backend == "te" else None
    if found is None:
        return None
    return f"fp8.backend=te with {found.what}: {found.why}; use fp8.backend=torch, or {found.way_out}"


def first_obstacle(run: "Run", fp8: Fp8Config) -> Obstacle | None:
    """What stands against Transformer Engine's FP8 in this run, whatever the hardware."""
    return next((found for look in OBSTACLES if (found := look(run, fp8)) is not None), None)


def settled_fp8(run: "Run") -> tuple[Fp8Config | None, str | None]:
    """`fp8.backend: auto` is ours where the run says so, with a line that tells why; the rest the hardware decides."""
    fp8 = run.config.fp8
    found = first_obstacle(run, fp8) if fp8 is not None and fp8.backend == "auto" else None
    if fp8 is None or found is None:
        return fp8, None
    ours = fp8.model_copy(update={"backend": "torch"})
    return ours, f"fp8.backend=auto: torch, because of {found.what}: {found.why}"


def linear_widths(model: ModelConfig, layout: Layout) -> list[tuple[str, int]]:
    """Of what linears of blocks take and give, elements on a rank."""
    widths = [("the model", model.hidden_size), *shared_widths(model, layout)]
    if model.mla is not None:
        widths += [("the keys' and values' rank", model.mla.kv_lora_rank)]
        widths += [("the queries' rank", model.mla.q_lora_rank)] if model.mla.q_lora_rank else []
    if model.electra is not None:
        widths.append(("the generator", model.generator.hidden_size))
    return widths


def shared_widths(model: ModelConfig, layout: Layout) -> Iterator[tuple[str, int]]:
    """What tp cuts of the linears of blocks, elements on each rank; of routed experts see `expert_width`."""
    tp = layout.tp
    yield "the attention's output", model.value_width // tp
    if model.mla is None:
        yield "the attention's projection", (model.query_width + 2 * model.kv_width) // tp
    else:
        yield "the queries' projection", model.query_width // tp
        width = model.mla.qk_nope_head_dim + model.mla.v_head_dim
        yield "the keys' and values' projection", model.num_attention_heads * width // tp
    if not all(model.has_experts(layer) for layer in range(model.num_layers)):
        yield "the MLP", model.ffn_width // tp
    if model.moe is not None and model.moe.shared_ffn_hidden_size:
        yield "the shared experts", model.moe.shared_ffn_hidden_size // tp
    if model.electra is not None:
        for name, width in shared_widths(model.generator, layout):
            yield name.replace("the ", "the generator's ", 1), width


def expert_width(model: ModelConfig, layout: Layout, fp8: Fp8Config) -> list[tuple[str, int]]:
    """What an expert's tensor group cuts, elements on each rank, where experts may follow the recipe."""
    if model.moe is None or not fp8.may_take_experts:
        return []
    return [("an expert", model.moe.ffn_hidden_size // layout.expert_tp)]


def _above(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
