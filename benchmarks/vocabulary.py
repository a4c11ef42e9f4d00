"""What a large vocabulary costs the last pipeline stage, and how much of it a partition by cost gets back.

The times of a block, the embedding and the head are measured here for each vocabulary; whole steps are simulated with
them.  "Balanced" is what Vocabulary Parallelism (Yeung et al. 2024, arXiv:2411.05288) aims at: the head's and the
embedding's work shared evenly by all stages.

    python -m benchmarks.vocabulary [--stages 4] [--layers 24] [--micro-batches 16] [--vocabularies 8192 ...]
"""

import argparse
import sys

from benchmarks.alone import world_of_one  # before DeepSpeed

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from model_providers.config import ModelConfig
from model_providers.cost import layer_costs
from model_providers.families import build_plan
from model_providers.layout import Layout
from model_providers.partition import partition_by
from pretrain.engine.auto_schedule import LayerTimes, measure
from pretrain.engine.groups import Groups, join
from pretrain.engine.schedules.catalogue import make_schedule
from pretrain.engine.schedules.simulate import Times, simulate

WIDTH, SEQUENCE, MICRO = 512, 256, 2
VOCABULARIES = (8_192, 32_768, 131_072)


def layer_times(vocabulary: int, groups: Groups) -> tuple[ModelConfig, list[LayerTimes]]:
    """Of one block, the embedding, the final norm and the head, as the engine measures them for `schedule: auto`."""
    model = ModelConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=8, vocab_size=vocabulary)
    plan = build_plan(
        model, groups.layout, groups.collection, seed=0, sequence_length=SEQUENCE, device=groups.device
    )
    times, _ = measure(plan, torch.zeros((MICRO, SEQUENCE), dtype=torch.int64), groups)
    return model, times


def step_s(layers: list[LayerTimes], bounds: list[int], stages: int, micro_batches: int) -> float:
    schedule = make_schedule("1f1b", stages=stages, chunks=1, num_micro_batches=micro_batches)

    def of(part: str) -> tuple[float, ...]:
        return tuple(sum(getattr(t, part) for t in layers[bounds[i] : bounds[i + 1]]) for i in range(stages))

    return simulate(schedule, Times(of("forward"), of("input_gradient"), of("weight_gradient"))).makespan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    words = parser.parse_args()
    title = (
        f"1F1B, {words.stages} stages, {words.layers} layers of {WIDTH}, {words.micro_batches} micro-batches"
    )
    table = Table(
        "vocabulary", "head / block", "uniform", "by cost", "balanced", "of the gain kept", title=title
    )
    with world_of_one():
        groups = join(Layout())
        for vocabulary in words.vocabularies:
            table.add_row(*row(vocabulary, groups, words.stages, words.layers, words.micro_batches))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def row(vocabulary: int, groups: Groups, stages: int, num_layers: int, micro_batches: int) -> list[str]:
    model, (embedding, block, norm, head) = layer_times(vocabulary, groups)
    layers = [embedding, *[block] * num_layers, norm, head]
    costs = layer_costs(model.model_copy(update={"num_layers": num_layers}), SEQUENCE)
    flops = [cost.forward_flops_per_token for cost in costs]
    even = [1.0] * len(layers)
    times = {
        "uniform": step_s(layers, partition_by("cost", even, even, stages), stages, micro_batches),
        "by cost": step_s(layers, partition_by("cost", flops, flops, stages), stages, micro_batches),
    }
    whole = sum(sum(vars(layer).values()) for layer in layers)
    times["balanced"] = whole / stages * (micro_batches + stages - 1)
    gain = (times["uniform"] - times["by cost"]) / (times["uniform"] - times["balanced"])
    ratio = sum(vars(head).values()) / sum(vars(block).values())
    return [f"{vocabulary:,}", f"{ratio:.1f}", *(f"{1e3 * t:.0f} ms" for t in times.values()), f"{gain:.0%}"]


if __name__ == "__main__":
    main()
