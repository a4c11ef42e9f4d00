"""Model FLOPs utilisation of a 1B-class Llama on one device, against the rate at which that device multiplies matrices.

Over the largest rate that torch's own matrix product reaches here (measured).  Whole optimizer steps of the engine, of
several micro-batches as runs have them, ZeRO-1 of one rank with fp32 master weights and moments, synthetic tokens.

    python -m benchmarks.mfu                  # on CUDA: sequence 4096, bf16, Transformer Engine where it is, and torch
    python -m benchmarks.mfu --profile        # where the time of a step goes, kernel by kernel
    python -m benchmarks.mfu --small          # a toy anywhere, to see that it runs; its ratios mean nothing
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args
from unittest.mock import patch

from benchmarks.alone import world_of_one  # before DeepSpeed
from benchmarks.throughput import LR, Shape, batch, deepspeed_json

# isort: split
import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity

from model_providers import initial
from model_providers.config import ModelConfig
from model_providers.cost import train_flops_per_token
from model_providers.families import build_plan
from model_providers.fp8.config import Fp8Config
from model_providers.kernels import KernelChoice as Kernels
from model_providers.kernels import transformer_engine_obstacle
from model_providers.layout import Layout
from pretrain.config import OptimizerConfig
from pretrain.engine.base import Engine, MicroBatch
from pretrain.engine.groups import Groups, join
from pretrain.engine.zero import build_zero_engine

# Widths and depth of Llama 3.2 1B (its config.json on the hub), with Llama 2's vocabulary.
LLAMA_1B = Shape(
    "Llama 1B, sequence 4096",
    ModelConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=8192,
        vocab_size=32000,
        max_sequence_length=4096,
    ),
    sequence=4096,
    micro=4,
)
# Four of Llama 3 8B's 32 blocks (its config.json on the hub), with the same vocabulary: wider products.
LLAMA_8B = Shape(
    "4 blocks of Llama 8B, sequence 4096",
    LLAMA_1B.model.model_copy(update={"num_layers": 4, "hidden_size": 4096, "ffn_hidden_size": 14336}),
    sequence=4096,
    micro=4,
)
SMALL = Shape(
    "toy",
    ModelConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=256,
        vocab_size=512,
        max_sequence_length=128,
    ),
    sequence=128,
    micro=2,
)
SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
MATRIX = {"cuda": 8192, "cpu": 512}  # rows, columns and sum of the measured product
NO_CUDA = "benchmarks: no CUDA device here; --small runs a toy on the CPU, whose ratios mean nothing"


@dataclass(frozen=True)
class Rate:
    """Of whole steps."""

    tokens_per_s: float
    flops_per_token: float
    loss: float  # of the last step

    def mfu(self, flops_per_s: float) -> float:
        return self.tokens_per_s * self.flops_per_token / flops_per_s


def seconds_of(work: Callable[[], Any], *, repeats: int, warmup: int = 3) -> float:
    """The median of a call."""
    times = []
    for number in range(warmup + repeats):
        get_accelerator().synchronize()
        started_s = time.perf_counter()
        work()
        get_accelerator().synchronize()
        if number >= warmup:
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def matrix_flops_per_s(device: torch.device, dtype: torch.dtype, *, repeats: int) -> float:
    """What torch's product of two large square matrices reaches; `launch.hardware` has datasheets."""
    size = MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: a @ b, repeats=repeats)


def train_rate(
    shape: Shape,
    *,
    steps: int,
    fp8: Fp8Config | None = None,
    kernels: Kernels = "auto",
    micro_batches: int = 1,
    profile: bool = False,
) -> Rate:
    """Of this rank alone; the engine goes with the call, and what it left when the next one is built."""
    gc.collect()
    get_accelerator().empty_cache()
    groups = join(Layout())
    with patch.object(initial, "_drawn", drawn_on(groups.device)):
        engine = build_engine(shape, groups, kernels, fp8)
    tokens, labels = batch(shape)
    weights = torch.full(labels.shape, 1.0 / labels.numel(), device=labels.device)
    step = MicroBatch(tokens, (labels, weights))
    losses: list[float] = []

    def train() -> None:
        losses.append(engine.train_step([step] * micro_batches).loss)

    elapsed_s = seconds_of(train, repeats=steps)
    if profile:
        tell_kernels(train)
    tokens_per_s = micro_batches * shape.tokens / elapsed_s
    return Rate(tokens_per_s, train_flops_per_token(shape.model, shape.sequence), losses[-1])


def build_engine(shape: Shape, groups: Groups, kernels: Kernels, fp8: Fp8Config | None) -> Engine:
    plan = build_plan(
        shape.model,
        groups.layout,
        groups.collection,
        seed=1,
        sequence_length=shape.sequence,
        params_dtype=torch.bfloat16,
        device=groups.device,
        kernels=kernels,
        fp8=fp8,
    )
    optimizer = OptimizerConfig(type="AdamW", lr=LR)
    return build_zero_engine(plan, groups, json=deepspeed_json(shape, "bf16"), optimizer=optimizer)


def drawn_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """In place of weights drawn on the CPU, a billion of which take longer than all that is measured."""

    def drawn(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std)

    return drawn


def tell_kernels(train: Callable[[], None], *, rows: int = 30) -> None:
    """What one step's time goes to, most first."""
    on_cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=kinds) as found:
        train()
        get_accelerator().synchronize()
    order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=70))


def bf16_kernels() -> list[Kernels]:
    """Those that bf16 is measured with here."""
    device = torch.device(get_accelerator().current_device_name())
    return ["te", "torch"] if transformer_engine_obstacle(device.type) is None else ["torch"]


def shape_here(words: argparse.Namespace) -> Shape:
    """Exits with 2 where there is nothing to measure."""
    if not words.small and not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        sys.exit(2)
    chosen = SMALL if words.small else SHAPES[words.shape]
    return replace(chosen, micro=words.micro or chosen.micro)


def parser(text: str | None) -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--small", action="store_true", help="a toy on any device; ratios mean nothing")
    own.add_argument("--shape", choices=SHAPES, default="1b", help="8b: four blocks of it")
    own.add_argument("--micro", type=int, help="samples of a micro-batch")
    own.add_argument("--steps", type=int, default=10, help="measured ones, after three")
    own.add_argument("--micro-batches", type=int, default=4, help="of a step")
    own.add_argument("--profile", action="store_true", help="print which kernels take a step's time")
    return own


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--kernels", nargs="+", choices=get_args(Kernels), metavar="KERNELS")
    words = own.parse_args()
    shape = shape_here(words)
    with world_of_one():
        device = torch.device(get_accelerator().current_device_name())
        peak = matrix_flops_per_s(device, torch.bfloat16, repeats=words.steps)
        print(f"{shape.name}, {words.micro_batches} micro-batches of {shape.micro} a step")
        print(f"bf16 products: {peak / 1e12:,.2f} TFLOP/s")
        for kernels in words.kernels or bf16_kernels():
            rate = train_rate(
                shape,
                steps=words.steps,
                kernels=kernels,
                micro_batches=words.micro_batches,
                profile=words.profile,
            )
            print(
                f"kernels {kernels}: {rate.tokens_per_s:,.0f} tokens/s, "
                f"{rate.tokens_per_s * rate.flops_per_token / 1e12:,.2f} TFLOP/s, MFU {rate.mfu(peak):.1%}, "
                f"loss {rate.loss:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
