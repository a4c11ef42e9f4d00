"""Forward and backward of our LayerPlan against Hugging Face's LlamaForCausalLM of the same shape.

Both eagerly, with the same weights and tokens, taking turns in one process so that a busy machine slows both;
the ratio is of medians.  Hugging Face computes its own loss, with whichever of its attention implementations
is the faster here (sdpa or eager; its sdpa leaves the fused kernel for grouped heads on the CPU).

    python -m benchmarks.model_speed [--turns 15] [--threads 2] [--shape small] [--dtype fp32] [--device cpu]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from model_providers.config import ModelConfig
from model_providers.cost import parameters, train_flops_per_token
from model_providers.gpt import build_plan, solo_groups
from model_providers.hugging_face import weights_to_hugging_face
from model_providers.hugging_face_config import config_to_hugging_face
from model_providers.layout import Layout

Step = Callable[[torch.Tensor], torch.Tensor]

SMALL = ModelConfig(
    num_layers=6,
    hidden_size=256,
    num_attention_heads=8,
    vocab_size=8192,
    max_sequence_length=256,
    tie_embeddings=False,
)
MEDIUM = ModelConfig(
    num_layers=10,
    hidden_size=512,
    num_attention_heads=8,
    vocab_size=16384,
    max_sequence_length=512,
    tie_embeddings=False,
)
SHAPES = {  # model and micro-batch
    "small": (SMALL, 8),
    "50m": (MEDIUM, 2),
    "50m-gqa": (MEDIUM.model_copy(update={"num_kv_heads": 4}), 2),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(model: ModelConfig, dtype: torch.dtype, device: str) -> tuple[nn.ModuleList, Step]:
    plan = build_plan(
        model,
        Layout(),
        solo_groups(),
        seed=1,
        sequence_length=model.max_sequence_length,
        params_dtype=dtype,
        device=device,
    )
    layers = nn.ModuleList(layer.build() for layer in plan.layers)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        """The mean over all tokens but the last, which has no successor, as in Hugging Face's loss."""
        value = tokens
        for layer in layers:
            value = layer(value)
        b, s = tokens.shape
        weights = torch.full((b, s), 1.0 / (b * (s - 1)), device=tokens.device)
        weights[:, -1] = 0.0
        loss = plan.loss(value, (tokens.roll(-1, dims=1), weights))
        loss.backward()
        return loss.detach()

    return layers, step


def theirs(
    model: ModelConfig, layers: nn.ModuleList, dtype: torch.dtype, device: str, attention: str
) -> tuple[nn.Module, Step]:
    names = ["embedding", *(f"layers.{i}" for i in range(model.num_layers)), "final_norm", "head"]
    weights = {
        f"{name}.{key}": tensor
        for name, layer in zip(names, layers, strict=True)
        for key, tensor in layer.state_dict().items()
    }
    config = LlamaConfig(**config_to_hugging_face(model), attn_implementation=attention, use_cache=False)
    module = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    module.load_state_dict(weights_to_hugging_face(weights, model))

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    return module.train(), step


def timed_s(module: nn.Module, step: Step, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward, and its loss."""
    module.zero_grad(set_to_none=True)
    started_s = time.perf_counter()
    loss = step(tokens).item()
    return time.perf_counter() - started_s, loss


def compare(shape: str, dtype_name: str, turns: int, device: str) -> None:
    model, micro_batch = SHAPES[shape]
    dtype = DTYPES[dtype_name]
    tokens = torch.randint(0, model.known_vocab_size, (micro_batch, model.max_sequence_length), device=device)
    layers, our_step = ours(model, dtype, device)
    rivals = {name: theirs(model, layers, dtype, device, name) for name in ("sdpa", "eager")}
    # The first round warms up; its losses must agree.  Two more tell which rival is the faster.
    _, our_loss = timed_s(layers, our_step, tokens)
    for module, step in rivals.values():
        _, their_loss = timed_s(module, step, tokens)
        assert abs(our_loss - their_loss) <= (1e-5 if dtype_name == "fp32" else 2e-2) * their_loss
    attention = min(rivals, key=lambda name: min(timed_s(*rivals[name], tokens)[0] for _ in range(2)))
    our_times_s: list[float] = []
    their_times_s: list[float] = []
    for turn in range(turns):
        contest = [(our_times_s, layers, our_step), (their_times_s, *rivals[attention])]
        for times_s, module, step in contest if turn % 2 else reversed(contest):
            times_s.append(timed_s(module, step, tokens)[0])
    our_s, their_s = statistics.median(our_times_s), statistics.median(their_times_s)
    count = tokens.numel()
    gflops = count * train_flops_per_token(model, model.max_sequence_length) / 1e9
    print(
        f"{shape:8} {dtype_name} {parameters(model) / 1e6:6.1f}M | ours {our_s * 1e3:7.0f} ms, "
        f"{count / our_s:6.0f} tokens/s, {gflops / our_s:5.0f} GFLOP/s | Hugging Face ({attention}) "
        f"{their_s * 1e3:7.0f} ms, {count / their_s:6.0f} tokens/s | ratio {their_s / our_s:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    for shape in [options.shape] if options.shape else SHAPES:
        for dtype in [options.dtype] if options.dtype else DTYPES:
            compare(shape, dtype, options.turns, options.device)


if __name__ == "__main__":
    main()
