"""What experts cost: whole steps against others, the parts of one layer, and what dispatchers send.

    python -m benchmarks.moe                     # all three
    python -m benchmarks.moe --parts steps       # tokens/s: Megaloom, a dense model of equal active parameters, Mixtral
    python -m benchmarks.moe --parts layer       # router, dispatch and combine, experts: shares of a layer's time
    python -m benchmarks.moe --parts traffic     # bytes and messages of each dispatcher, 8 ranks as 4 nodes of 2

Steps: one process, one run, contenders interleaved; the same shape, batch, optimizer, clipping and auxiliary loss for
all (the dense model has none).  Hugging Face's Mixtral runs with each of its implementations of experts; the best
counts.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal, cast

from benchmarks.alone import world_of_one  # before DeepSpeed

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.throughput import (
    DTYPES,
    LARGE,
    SMALL,
    Shape,
    Step,
    measure,
    ours,
    plain_loop,
    seconds,
    under_deepspeed,
)
from model_providers.config import MoEConfig
from model_providers.cost import active_parameters, parameters
from model_providers.dispatch import Nodes, Traffic
from model_providers.families import build_plan
from model_providers.layout import Layout
from model_providers.moe_layer import ExpertLayer
from model_providers.random_streams import seed_streams
from model_providers.router import set_loss_scale
from tests.ranks import RankPool

MOE = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=1, aux_loss=0.01)
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies an expert for each token: 24 GiB do not suffice
SHAPES = {"small": SMALL, "large": LARGE}


def with_experts(shape: Shape) -> Shape:
    """Each expert half as wide as the dense model's MLP, two for a token: the same active parameters."""
    width = shape.model.ffn_width // MOE.top_k
    moe = MOE.model_copy(update={"ffn_hidden_size": width})
    return replace(shape, model=shape.model.model_copy(update={"moe": moe}))


def mixtral(shape: Shape, implementation: str) -> MixtralForCausalLM:
    model, moe = shape.model, shape.model.moe
    assert moe is not None
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=model.known_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=moe.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=model.tie_embeddings,
        output_router_logits=True,
        router_aux_loss_coef=moe.aux_loss,
        attn_implementation="sdpa",
        experts_implementation=implementation,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def contenders(dense: Shape, dtype: str, implementations: list[str]) -> dict[str, Step]:
    shape = with_experts(dense)
    steps = {"Megaloom": ours(shape, dtype, False), "Megaloom, dense": ours(dense, dtype, False)}
    for name in implementations:
        mine = mixtral(shape, name)
        steps[f"Mixtral {name} + DeepSpeed"] = under_deepspeed(mine, shape, dtype, False)
        steps[f"Mixtral {name}, plain loop"] = plain_loop(mixtral(shape, name), shape, dtype, False)
    return steps


def steps_table(dense: Shape, dtype: str, medians: dict[str, float]) -> Table:
    model = with_experts(dense).model
    sizes = f"{parameters(model) / 1e6:.1f}M parameters, {active_parameters(model) / 1e6:.1f}M active"
    batch = f"sequence {dense.sequence} x {dense.micro}"
    title = f"{dense.name}, {MOE.num_experts} experts, {MOE.top_k} per token ({sizes}), {batch}, {dtype}"
    rows = Table("contender", "ms per step", "tokens/s", "Megaloom is", title=title)
    best = min(value for name, value in medians.items() if name.startswith("Mixtral"))
    for name, value in medians.items():
        ratio = f"{value / medians['Megaloom']:.2f}x"
        if name == "Megaloom":
            ratio = f"{best / value:.2f}x the best Mixtral"
        rows.add_row(name, f"{1e3 * value:.1f}", f"{dense.tokens / value:,.0f}", ratio)
    return rows


def expert_layer_of(shape: Shape, dtype: str) -> ExpertLayer:
    """The layer of experts of a block, in a world of one."""
    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    plan = build_plan(
        shape.model,
        Layout(tp=1, pp=1, dp=1),
        groups,
        seed=0,
        sequence_length=shape.sequence,
        params_dtype=DTYPES[dtype],
    )
    return cast(Any, plan.layers[1].build()).mlp


def layer_parts(shape: Shape, dtype: str) -> dict[str, Step]:
    """Forward and backward of a whole layer of experts, and of each of its parts alone on the same tokens."""
    layer = expert_layer_of(shape, dtype)
    x = torch.randn(shape.sequence, shape.micro, shape.model.hidden_size, dtype=DTYPES[dtype])
    x.requires_grad_()
    router, dispatcher, experts = layer.router, layer.token_dispatcher, layer.experts
    with torch.no_grad():
        probs, chosen = router(x)
        tokens, weights = dispatcher.dispatch_preprocess(x, chosen, probs)
        tokens, weights = dispatcher.token_dispatch(tokens, weights)
        tokens, counts, weights = dispatcher.dispatch_postprocess(tokens, weights)
    probs, tokens, weights = (value.detach().requires_grad_() for value in (probs, tokens, weights))

    def move() -> torch.Tensor:
        held, scores = dispatcher.dispatch_preprocess(x, chosen, probs)
        held, scores = dispatcher.token_dispatch(held, scores)
        held, _, _ = dispatcher.dispatch_postprocess(held, scores)
        held = dispatcher.token_combine(dispatcher.combine_preprocess(held))
        return dispatcher.combine_postprocess(held)

    return {
        "whole layer": there_and_back(lambda: layer(x)[0]),
        "router": there_and_back(lambda: router(x)[0]),
        "dispatch and combine": there_and_back(move),
        "experts": there_and_back(lambda: experts(tokens, counts, weights)[0]),
    }


def there_and_back(forward: Callable[[], torch.Tensor]) -> Step:
    gradient = torch.randn_like(forward())
    return lambda: forward().backward(gradient)


def layer_table(shape: Shape, dtype: str, medians: dict[str, float]) -> Table:
    title = f"a layer of experts of {shape.name}, {shape.tokens:,} tokens, {dtype}, forward and backward"
    rows = Table("part", "ms", "share", title=title)
    for name, value in medians.items():
        rows.add_row(name, f"{1e3 * value:.2f}", f"{value / medians['whole layer']:.0%}")
    return rows


def traffic_of(
    dispatcher: Literal["allgather", "alltoall", "hierarchical"], repeats: int, ranks_per_node: int
) -> tuple[Traffic | None, float]:
    """On each rank: what one forward pass of a layer sends, and the median seconds of forward and backward."""
    parallel_state.destroy_model_parallel()
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=size, expert_tensor_parallel_size=1)
    nodes = size // ranks_per_node
    at_home = [list(range(n * ranks_per_node, (n + 1) * ranks_per_node)) for n in range(nodes)]
    in_place = [list(range(p, size, ranks_per_node)) for p in range(ranks_per_node)]
    inner = [dist.new_group(ranks) for ranks in at_home][rank // ranks_per_node]
    outer = [dist.new_group(ranks) for ranks in in_place][rank % ranks_per_node]
    shape = with_experts(replace(SMALL, micro=1))
    plan = build_plan(
        shape.model,
        Layout(dp=size, ep=size, dispatcher=dispatcher),
        ProcessGroupCollection.use_mpu_process_groups(),
        seed=0,
        sequence_length=shape.sequence,
        nodes=Nodes(inner, outer, ranks_per_node),
    )
    seed_streams(1)
    set_loss_scale(1.0, torch.device("cpu"))
    layer = cast(Any, plan.layers[1].build()).mlp
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape.sequence, shape.micro, shape.model.hidden_size, generator=generator)
    x.requires_grad_()
    layer(x)[0].sum().backward()
    counted = getattr(layer.token_dispatcher, "traffic", None)
    first = Traffic(**asdict(counted)) if counted is not None else None
    step = there_and_back(lambda: layer(x)[0])
    return first, statistics.median(seconds(step) for _ in range(repeats))


def traffic_table(repeats: int, *, nodes: int = 4, ranks_per_node: int = 2) -> Table:
    size = nodes * ranks_per_node
    tokens = SMALL.sequence
    row_bytes = 4 * SMALL.model.hidden_size
    what = f"one layer of 8 experts on {nodes} nodes of {ranks_per_node} ranks, {tokens} tokens of {row_bytes} bytes"
    title = f"{what}; sent by a rank in one forward pass"
    rows = Table(
        "dispatcher", "messages in the node", "KiB", "between nodes", "KiB", "ms, this machine", title=title
    )
    pool = RankPool(size)
    for name in ("allgather", "alltoall", "hierarchical"):
        runs = pool.run(traffic_of, size, name, repeats, ranks_per_node)
        ms = f"{1e3 * max(took for _, took in runs):.1f}"
        counts = [counted for counted, _ in runs if counted is not None]
        if not counts:  # every token goes to every rank, and a sum comes back
            each = 2 * tokens * row_bytes / 1024
            near, far = (ranks_per_node - 1) * each, (size - ranks_per_node) * each
            rows.add_row(name, "ring", f"{near:,.0f} (computed)", "ring", f"{far:,.0f} (computed)", ms)
            continue
        rows.add_row(name, *means(counts), ms)
    return rows


def means(counts: list[Traffic]) -> list[str]:
    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    return [
        f"{mean([c.messages_within_node for c in counts]):.0f}",
        f"{mean([c.bytes_within_node for c in counts]) / 1024:,.0f}",
        f"{mean([c.messages_between_nodes for c in counts]):.0f}",
        f"{mean([c.bytes_between_nodes for c in counts]) / 1024:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["steps", "layer", "traffic"]
    parser.add_argument("--parts", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shapes", nargs="+", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    shapes = [SHAPES[name] for name in words.shapes]
    if "traffic" in words.parts:
        console.print(traffic_table(words.repeats))
    with world_of_one():
        set_loss_scale(1.0, torch.device("cpu"))
        for dense in shapes:
            for dtype in words.dtypes:
                if "layer" in words.parts:
                    parallel_state.destroy_model_parallel()
                    shape = with_experts(dense)
                    console.print(
                        layer_table(
                            shape, dtype, measure(layer_parts(shape, dtype), repeats=3 * words.repeats)
                        )
                    )
        parallel_state.destroy_model_parallel()
        for dense in shapes:
            for dtype in words.dtypes:
                if "steps" in words.parts:
                    made = contenders(dense, dtype, words.implementations)
                    console.print(steps_table(dense, dtype, measure(made, repeats=words.repeats)))
                    del made
                    gc.collect()


if __name__ == "__main__":
    main()
