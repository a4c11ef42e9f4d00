"""Tokens per second of whole optimizer steps: Megaloom, Hugging Face under DeepSpeed, and a plain PyTorch loop.

One process, one run, contenders interleaved so that a noisy machine is noisy to all; medians and ratios.  The same
shape, batch, optimizer (torch's fused AdamW) and clipping for all; both DeepSpeed contenders have the same JSON.
The plain loop keeps bf16 weights without fp32 master weights, which is less work than the others do.

    python -m benchmarks.throughput                 # both shapes, fp32 and bf16
    python -m benchmarks.throughput --compile       # also with torch.compile on every contender
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.alone import world_of_one  # before DeepSpeed

# isort: split
import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from model_providers.config import ModelConfig
from model_providers.cost import parameters, train_flops_per_token
from model_providers.families import build_plan
from model_providers.layout import Layout
from pretrain.config import OptimizerConfig
from pretrain.ds_config import Facts, complete
from pretrain.engine.base import MicroBatch
from pretrain.engine.groups import device_of_this_rank, join
from pretrain.engine.zero import build_zero_engine

LR, CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class Shape:
    name: str
    model: ModelConfig
    sequence: int
    micro: int

    @property
    def tokens(self) -> int:
        return self.sequence * self.micro


SMALL = Shape(
    "6 x 256",
    ModelConfig(
        num_layers=6,
        hidden_size=256,
        num_attention_heads=8,
        ffn_hidden_size=768,
        vocab_size=8192,
        tie_embeddings=True,
    ),
    sequence=256,
    micro=8,
)
LARGE = Shape(
    "8 x 640",
    ModelConfig(
        num_layers=8,
        hidden_size=640,
        num_attention_heads=10,
        num_kv_heads=5,
        ffn_hidden_size=1792,
        vocab_size=16384,
        tie_embeddings=True,
    ),
    sequence=512,
    micro=2,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]


def batch(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and next tokens, int64 [b s]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0, shape.model.known_vocab_size, (shape.micro, shape.sequence + 1), generator=generator
    )
    device = device_of_this_rank()
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def deepspeed_json(shape: Shape, dtype: str) -> dict[str, object]:
    optimizer = {
        "type": "AdamW",
        "lr": LR,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "params": {},
    }
    facts = Facts(
        train_batch_size=shape.micro,
        train_micro_batch_size_per_gpu=shape.micro,
        gradient_accumulation_steps=1,
        gradient_clipping=CLIP,
        optimizer=optimizer,
        dtype=dtype,
        accumulate="fp32",
        tensorboard=False,
        folder="unused",
        nvme_path=None,
        hidden_size=shape.model.hidden_size,
        parameters_per_rank=parameters(shape.model),
        largest_shard=0,
    )
    stage = 0 if dtype == "fp32" else 1
    return complete({"zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"}}, facts)


def ours(shape: Shape, dtype: str, compiled: bool) -> Step:
    groups = join(Layout(tp=1, pp=1, dp=1))
    plan = build_plan(
        shape.model,
        groups.layout,
        groups.collection,
        seed=0,
        sequence_length=shape.sequence,
        params_dtype=DTYPES[dtype],
        device=groups.device,
    )
    engine = build_zero_engine(
        plan, groups, json=deepspeed_json(shape, dtype), optimizer=OptimizerConfig(lr=LR)
    )
    if compiled:
        for layer in engine.layers:
            layer.module.compile()
    tokens, labels = batch(shape)
    weights = torch.full((1, 1), 1.0 / labels.numel(), device=groups.device).expand_as(labels)
    micro_batch = MicroBatch(tokens, (labels, weights))
    return lambda: engine.train_step([micro_batch]) and None


def hugging_face(shape: Shape) -> LlamaForCausalLM:
    model = shape.model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.known_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def under_deepspeed(model: torch.nn.Module, shape: Shape, dtype: str, compiled: bool) -> Step:
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=decayed_and_not(model), config=deepspeed_json(shape, dtype)
    )
    if compiled:
        engine.module.compile()
    tokens, labels = batch(shape)

    def step() -> None:
        loss = engine(input_ids=tokens, labels=labels, shift_labels=labels).loss
        engine.backward(loss)
        engine.step()

    return step


def plain_loop(model: torch.nn.Module, shape: Shape, dtype: str, compiled: bool) -> Step:
    model = model.to(device_of_this_rank(), DTYPES[dtype])
    optimizer = torch.optim.AdamW(decayed_and_not(model), lr=LR, betas=(0.9, 0.95), fused=True)
    if compiled:
        model.compile()
    tokens, labels = batch(shape)

    def step() -> None:
        model(input_ids=tokens, labels=labels, shift_labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decayed_and_not(model: torch.nn.Module) -> list[dict[str, object]]:
    """The same two groups as ours."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def contenders(shape: Shape, dtype: str, compiled: bool) -> dict[str, Step]:
    return {
        "Megaloom": ours(shape, dtype, compiled),
        "Hugging Face + DeepSpeed": under_deepspeed(hugging_face(shape), shape, dtype, compiled),
        "Hugging Face, plain loop": plain_loop(hugging_face(shape), shape, dtype, compiled),
    }


def seconds(step: Step) -> float:
    started_s = time.perf_counter()
    step()
    get_accelerator().synchronize()
    return time.perf_counter() - started_s


def measure(steps: dict[str, Step], *, repeats: int) -> dict[str, float]:
    """Median seconds per step of each contender; each round steps all of them once, in turn."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--shapes", nargs="+", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    with world_of_one():
        console = Console(width=None if sys.stdout.isatty() else 120)
        for shape in [{"small": SMALL, "large": LARGE}[name] for name in words.shapes]:
            for dtype in words.dtypes:
                for compiled in (False, True) if words.compile else (False,):
                    medians = measure(contenders(shape, dtype, compiled), repeats=words.repeats)
                    gc.collect()
                    console.print(table(shape, dtype, medians, compiled=compiled))


def table(shape: Shape, dtype: str, medians: dict[str, float], *, compiled: bool) -> Table:
    best_other = min(value for name, value in medians.items() if name != "Megaloom")
    flops = train_flops_per_token(shape.model, shape.sequence)
    size = f"{parameters(shape.model, padded=False) / 1e6:.1f}M parameters"
    how = f"{dtype}, compiled" if compiled else dtype
    title = f"{shape.name} ({size}), sequence {shape.sequence} x {shape.micro}, {how}"
    rows = Table("contender", "ms per step", "tokens/s", "GFLOP/s", "Megaloom is", title=title)
    for name, value in medians.items():
        ratio = (
            f"{value / medians['Megaloom']:.2f}x"
            if name != "Megaloom"
            else f"{best_other / value:.2f}x the best"
        )
        rate = shape.tokens / value
        rows.add_row(name, f"{1e3 * value:.1f}", f"{rate:,.0f}", f"{rate * flops / 1e9:.0f}", ratio)
    return rows


if __name__ == "__main__":
    main()
