"""What goes with FP8: rules of `config_rules`, kept apart for their subject."""

from typing import TYPE_CHECKING

from model_providers.fp8.config import BLOCKS, Fp8Config, GuardConfig, Recipe
from pretrain.fp8_te_rules import expert_width, linear_widths, shared_widths, transformer_engine_can
from pretrain.optimizer_rules import Rule

if TYPE_CHECKING:  # Run holds what the rules look at; config_io imports this module
    from pretrain.config_io import Run

# Of torch's eight-bit products on CUDA (aten/src/ATen/native/cuda/ScaledBlas.cpp); others are emulated.
TORCH_MULTIPLES: dict[Recipe, int] = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}


def fp8_has_a_wide_format_beside_it(run: "Run") -> str | None:
    fp8, dtype = run.config.fp8, run.config.precision.dtype
    if fp8 is not None and dtype == "fp16":
        return (
            f"fp8.recipe={fp8.recipe} with precision.dtype=fp16: fp16's loss scale and FP8's own scales would pull "
            "against each other; use precision.dtype=bf16"
        )
    return None


def four_bits_are_an_experiment(run: "Run") -> str | None:
    fp8 = run.config.fp8
    if fp8 is not None and fp8.recipe == "nvfp4" and fp8.backend != "te" and not fp8.experiment:
        return (
            "fp8.recipe=nvfp4: four bits are emulated here, slower than bf16 and as much memory; set "
            "fp8.experiment=true to try what they do to a loss, or use mxfp8"
        )
    return None


def some_blocks_are_fp8(run: "Run") -> str | None:
    fp8, model = run.config.fp8, run.config.model
    if fp8 is None:
        return None
    depths = [model.num_layers, *([model.t5.num_encoder_layers] if model.t5 is not None else [])]
    if any(fp8.is_fp8_block(index, depth) for depth in depths for index in range(depth)):
        return None
    return (
        f"fp8.bf16_first={fp8.bf16_first}, fp8.bf16_last={fp8.bf16_last} with {max(depths)} blocks: none is left for "
        f"FP8; use less, such as fp8.bf16_first=0 fp8.bf16_last=0"
    )


def options_belong_to_the_recipe(run: "Run") -> str | None:
    fp8 = run.config.fp8
    if fp8 is None:
        return None
    users = {"amax_history": ("delayed",), "margin": ("delayed", "current"), "experiment": ("nvfp4",)}
    for name, recipes in users.items():
        if name in fp8.model_fields_set and fp8.recipe not in recipes and getattr(fp8, name):
            return (
                f"fp8.{name}={getattr(fp8, name)} with fp8.recipe={fp8.recipe}: it belongs to "
                f"{' and '.join(recipes)}; leave it out"
            )
    return None


def experts_are_there(run: "Run") -> str | None:
    fp8 = run.config.fp8
    if fp8 is not None and fp8.experts is not None and run.config.model.moe is None:
        return (
            f"fp8.experts={str(fp8.experts).lower()}: the model has no routed experts; leave it out, or give it "
            f"model.moe.num_experts"
        )
    return None


def blocks_are_not_cut_by_tp(run: "Run") -> str | None:
    """A scale's block that lies on two tensor ranks would be two blocks, and the layout would change the numbers."""
    fp8, layout = run.config.fp8, run.layout
    if fp8 is None or layout.tp == 1 or fp8.recipe not in BLOCKS:
        return None
    size = BLOCKS[fp8.recipe]
    of_experts = expert_width(run.config.model, layout, fp8) if layout.expert_tp > 1 else []
    for name, width in [*shared_widths(run.config.model, layout), *of_experts]:
        if width % size:
            way_out = (
                "layout.etp=1, fp8.experts=false"
                if of_experts and name == of_experts[0][0]
                else "a smaller tp"
            )
            return (
                f"fp8.recipe={fp8.recipe} with layout.tp={layout.tp}: a rank's share of {name} is {width} wide, no "
                f"multiple of the {size} numbers that share a scale; use {way_out}, or fp8.recipe=current"
            )
    return None


def emulated_on_cuda(run: "Run", fp8: Fp8Config) -> str | None:
    """Why torch's eight-bit units will not do the products of this run: no fault, but no faster than 16 bits."""
    multiple = TORCH_MULTIPLES.get(fp8.recipe)
    if multiple is None:
        return f"fp8.recipe={fp8.recipe}: torch has no such products, they are emulated and slower than bf16"
    tokens = run.micro_size * run.config.data.sequence_length
    sizes = [("a micro-batch", "tokens", tokens)]
    widths = linear_widths(run.config.model, run.layout) + expert_width(run.config.model, run.layout, fp8)
    sizes += [(name, "wide", width) for name, width in widths]
    for name, unit, size in sizes:
        if size % multiple:
            return (
                f"fp8.recipe={fp8.recipe}: {name} is {size} {unit}, no multiple of {multiple}; such products are "
                "emulated and slower than bf16"
            )
    return None


def limits_are_looked_at(run: "Run") -> str | None:
    fp8 = run.config.fp8
    if fp8 is None or fp8.guard is None:
        return None
    for looks, names in (("watch_every", ("overflow", "underflow", "strikes")), ("shadow_every", ("gap",))):
        for name in names:
            value, usual = getattr(fp8.guard, name), GuardConfig.model_fields[name].default
            if value != usual and not getattr(fp8, looks):
                return (
                    f"fp8.guard.{name}={value:g} with fp8.{looks}=0: nobody looks, so the limit means nothing; set "
                    f"fp8.{looks}={Fp8Config.model_fields[looks].default or 100}, or leave the limit out"
                )
    return None


def looks_are_at_our_linears(run: "Run") -> str | None:
    fp8 = run.config.fp8
    if fp8 is None or fp8.backend != "te":
        return None
    for name in ("watch_every", "shadow_every", "guard"):
        value = getattr(fp8, name)
        if value and value != Fp8Config.model_fields[name].default:
            told = f"fp8.{name}" if name == "guard" else f"fp8.{name}={value}"
            return (
                f"{told} with fp8.backend=te: Transformer Engine keeps its scales to itself; use fp8.backend=torch, or "
                f"leave fp8.{name} out"
            )
    return None


FP8_RULES: tuple[Rule, ...] = (
    fp8_has_a_wide_format_beside_it,
    four_bits_are_an_experiment,
    some_blocks_are_fp8,
    options_belong_to_the_recipe,
    experts_are_there,
    transformer_engine_can,
    blocks_are_not_cut_by_tp,
    limits_are_looked_at,
    looks_are_at_our_linears,
)
