"""What a run is about to do, in a few lines on the console before the first step."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from model_providers.config import ModelConfig
from model_providers.cost import active_parameters
from model_providers.layer_plan import LayerPlan
from pretrain.config_io import Run
from pretrain.engine.base import Engine
from pretrain.engine.schedules.ops import Placement
from pretrain.monitor.sinks import counted, short

NAMED = 4  # linears, on one line


def show(
    console: Console,
    run: Run,
    engine: Engine,
    plan: LayerPlan,
    *,
    resumed: Path | None,
    barred: Sequence[str] = (),
) -> None:
    """Print the run's facts; only rank 0 calls it.  ``barred``: linears that a guard took out of FP8."""
    table = Table.grid(padding=(0, 2))
    for name, text in facts(run, engine, resumed=resumed, barred=barred):
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(table)
    if run.layout.pp > 1:
        console.print(stage_table(run, plan))


def facts(
    run: Run, engine: Engine, *, resumed: Path | None, barred: Sequence[str] = ()
) -> Iterable[tuple[str, str]]:
    """Name and text of each line."""
    config, model, layout = run.config, run.config.model, run.layout
    yield "run", f"{config.name}, writes into {run.folder}"
    yield (
        "model",
        f"{short(run.parameters)} parameters: {counted(model.num_layers, 'layer')}, width {model.hidden_size}, "
        f"{counted(model.num_attention_heads, 'head')} ({model.kv_heads} key/value), vocabulary {model.vocab_size} "
        f"(padded {model.padded_vocab_size})",
    )
    yield from _special_parts(model)
    pipeline = f" ({config.layout.schedule}, {counted(layout.chunks, 'chunk')} each)" if layout.pp > 1 else ""
    sequence = " with sequence parallelism" if layout.sequence_parallel else ""
    yield (
        "layout",
        f"{counted(layout.world_size, 'rank')}: tp={layout.tp}{sequence}, pp={layout.pp}{pipeline}, dp={layout.dp}, "
        f"{_sharing(run)}ZeRO stage {run.zero_stage}",
    )
    yield (
        "batch",
        f"{counted(run.global_size, 'sample')} = micro {run.micro_size} x accumulation {run.num_micro_batches} x dp "
        f"{layout.dp}; "
        f"{short(run.tokens_per_step)} tokens per step, {short(run.tokens_per_step * config.train.steps)} "
        f"in {counted(config.train.steps, 'step')}",
    )
    clipping = run.deepspeed["gradient_clipping"]
    yield (
        "numbers",
        f"weights {config.precision.dtype}, gradients summed in "
        f"{run.deepspeed['data_types']['grad_accum_dtype']}, "
        f"{_masters(run)}, clipping {f'at norm {clipping}' if clipping else 'off'}",
    )
    if config.fp8 is not None:
        yield "fp8", f"{_eight_bits(run, engine)}{_barred(barred, config.precision.dtype)}"
    yield (
        "optimizer",
        f"{config.optimizer.type} ({type(engine.deepspeed.optimizer).__name__}), "
        f"peak learning rate {config.optimizer.lr:g}",
    )
    if config.recompute.mode == "selective":
        yield "recompute", f"selective: {', '.join(config.recompute.forgotten)}"
    elif config.recompute.mode == "full":
        yield "recompute", f"full, every {config.recompute.every}"
    if run.chunk_tokens is not None:
        yield "loss", f"in chunks of {run.chunk_tokens} tokens"
    if resumed is not None:
        yield "resumed", f"from {resumed}"
    elif config.checkpoint.weights_from:
        yield "weights", f"from {config.checkpoint.weights_from}"


def _masters(run: Run) -> str:
    """In which format DeepSpeed keeps master weights and optimizer states."""
    for name in ("bf16", "fp16"):
        section = run.deepspeed.get(name) or {}
        if section.get("enabled") and section.get(f"{name}_master_weights_and_grads"):
            states = name if section.get("bf16_optimizer_states") else "fp32"
            return f"master weights and gradients {name}, optimizer states {states}"
    return "master weights fp32"


def _eight_bits(run: Run, engine: Engine) -> str:
    """Whose products, and what stays as it is."""
    config, fp8, eight_bits = run.config, run.config.fp8, engine.deepspeed.eight_bits
    assert fp8 is not None
    whose = "Transformer Engine" if len(eight_bits.followers) > len(eight_bits.scalings) else "torch"
    outer = [f"the first {fp8.bf16_first}"] if fp8.bf16_first else []
    outer += [f"the last {fp8.bf16_last}"] if fp8.bf16_last else []
    kept = [f"{' and '.join(outer)} of a stack's blocks"] if outer else []
    too = ""
    if config.model.moe is not None and (fp8.experts is False or whose != "torch"):
        kept.append("routed experts")
    elif config.model.moe is not None:
        too = ", routed experts too"
    stay = f"; {', '.join(kept)} stay in {config.precision.dtype}" if kept else ""
    begins = f" from step {fp8.start_step} on" if fp8.start_step else ""
    return f"{fp8.recipe} by {whose}{too}{begins}{stay}"


def _barred(names: Sequence[str], wide: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"; back in {wide} for good: {', '.join(names[:NAMED])}{more}"


def _special_parts(model: ModelConfig) -> Iterable[tuple[str, str]]:
    """Experts, latent attention and looking ahead, where the model has them."""
    if model.moe is not None:
        moe = model.moe
        shared = (
            f" and a shared one of width {moe.shared_ffn_hidden_size}" if moe.shared_ffn_hidden_size else ""
        )
        yield (
            "experts",
            f"{moe.top_k} of {moe.num_experts} of width {moe.ffn_hidden_size}{shared}, in "
            f"{counted(model.num_expert_layers, 'layer')}; {short(active_parameters(model))} parameters a token",
        )
    if model.mla is not None:
        yield "attention", f"latent, keys and values from {model.mla.kv_lora_rank} numbers a token"
    if model.mtp is not None:
        yield (
            "looks ahead",
            f"{counted(model.mtp.depth, 'token')} further, loss times {model.mtp.loss_weight:g}",
        )


def _sharing(run: Run) -> str:
    layout = run.layout
    if layout.ep == 1:
        return ""
    return f"ep={layout.ep} (each expert on {counted(layout.expert_tp, 'rank')}, {layout.dispatcher}), "


def stage_table(run: Run, plan: LayerPlan) -> Table:
    """Layers, parameters and FLOPs of each run of layers, in the order in which data flow through them."""
    layout, bounds = run.layout, run.stage_bounds
    placement = Placement(layout.pp, layout.chunks, layout.placement)
    first = "stage" if layout.chunks == 1 else "stage, chunk"
    table = Table(first, "layers", "parameters", "GFLOP per token", "share")
    totals = [
        sum(layer.cost.forward_flops_per_token for layer in plan.layers[a:b]) for a, b in pairwise(bounds)
    ]
    for stage, (start, end) in enumerate(pairwise(bounds)):
        layers = plan.layers[start:end]
        place = str(placement.rank(stage))
        table.add_row(
            place if layout.chunks == 1 else f"{place}, {placement.chunk(stage)}",
            layers[0].name if len(layers) == 1 else f"{layers[0].name} .. {layers[-1].name}",
            short(sum(layer.cost.parameters for layer in layers)),
            f"{totals[stage] / 1e9:.2g}",
            f"{totals[stage] / sum(totals):.0%}",
        )
    return table
