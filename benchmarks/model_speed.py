"""Forward and backward of our LayerPlan against Hugging Face's LlamaForCausalLM of the same shape.

Both with the same weights, eagerly, on the same tokens, taking turns in one process, so that a busy machine slows both; the
ratio is of medians.  Hugging Face computes its own loss and runs its SDPA attention.

    python -m benchmarks.model_speed [--turns 15] [--threads 2] [--shape small|50m] [--dtype fp32|bf16] [--device cpu]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model_providers.config import ModelConfig
from model_providers.cost import parameters, train_flops_per_token
from model_providers.gpt import build_plan, solo_groups
from model_providers.hugging_face import weights_to_hugging_face
from model_providers.hugging_face_config import config_to_hugging_face
from model_providers.layout import Layout

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
    num_kv_heads=4,
    vocab_size=16384,
    max_sequence_length=512,
    tie_embeddings=False,
)
SHAPES = {"small": (SMALL, 8), "50m": (MEDIUM, 2)}  # model, micro-batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(
    model: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[nn.ModuleList, Callable[[torch.Tensor], torch.Tensor]]:
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
        """The mean over all tokens but the first, as Hugging Face's."""
        value = tokens
        for layer in layers:
            value = layer(value)
        weights = torch.full(
            tokens.shape, 1.0 / (tokens.size(0) * (tokens.size(1) - 1)), device=tokens.device
        )
        weights[:, -1] = 0.0
        loss = plan.loss(value, (tokens.roll(-1, dims=1), weights))
        loss.backward()
        return loss.detach()

    return layers, step


def theirs(
    model: ModelConfig, layers: nn.ModuleList, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    names = ["embedding", *(f"layers.{i}" for i in range(model.num_layers)), "final_norm", "head"]
    weights = {
        f"{name}.{key}": tensor
        for name, layer in zip(names, layers, strict=True)
        for key, tensor in layer.state_dict().items()
    }
    config = LlamaConfig(**config_to_hugging_face(model), attn_implementation="sdpa", use_cache=False)
    module = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    module.load_state_dict(weights_to_hugging_face(weights, model))

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    return module.train(), step


def timed_s(
    module: nn.Module, step: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> tuple[float, float]:
    module.zero_grad(set_to_none=True)
    started_s = time.perf_counter()
    loss = step(tokens).item()
    return time.perf_counter() - started_s, loss


def compare(shape: str, dtype_name: str, turns: int, device: str) -> None:
    model, micro_batch = SHAPES[shape]
    dtype = DTYPES[dtype_name]
    layers, our_step = ours(model, dtype, device)
    module, their_step = theirs(model, layers, dtype, device)
    tokens = torch.randint(0, model.known_vocab_size, (micro_batch, model.max_sequence_length), device=device)
    pairs = list(_turns(turns + 2, (layers, our_step), (module, their_step), tokens))
    (_, our_loss), (_, their_loss) = pairs[0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(our_loss - their_loss) <= tolerance * their_loss, (our_loss, their_loss)
    our_s = statistics.median(mine[0] for mine, _ in pairs[2:])
    their_s = statistics.median(other[0] for _, other in pairs[2:])
    count = tokens.numel()
    gflops = count * train_flops_per_token(model, model.max_sequence_length) / 1e9
    print(
        f"{shape:6} {dtype_name}  {parameters(model) / 1e6:5.1f}M  ours {our_s * 1e3:8.1f} ms {count / our_s:8.0f} tokens/s "
        f"{gflops / our_s:6.1f} GFLOP/s   Hugging Face {their_s * 1e3:8.1f} ms {count / their_s:8.0f} tokens/s   "
        f"ratio {their_s / our_s:.3f}"
    )


def _turns(turns: int, mine: tuple, other: tuple, tokens: torch.Tensor) -> Iterator[tuple]:
    """Who goes first alternates."""
    for turn in range(turns):
        if turn % 2:
            second = timed_s(*other, tokens)
            yield timed_s(*mine, tokens), second
        else:
            yield timed_s(*mine, tokens), timed_s(*other, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in [options.shape] if options.shape else SHAPES:
        for dtype in [options.dtype] if options.dtype else DTYPES:
            compare(shape, dtype, options.turns, options.device)


if __name__ == "__main__":
    main()
