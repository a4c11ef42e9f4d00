"""What the loss takes of a large vocabulary's head, in chunks of tokens and with whole logits: bytes and time.

Forward and backward of the head and the loss alone, tied to nothing.  "naive" is torch's cross-entropy of a product,
as one would write it; "whole" is this stack's loss on whole logits, which writes their gradient over them; the rest
work in chunks.  Peaks are those of tensors, each storage from its first operation to its end, beside inputs and weight.

    python -m benchmarks.loss [--words 131072] [--tokens 2048] [--width 512] [--dtype fp32]
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from model_providers.building import solo_groups
from model_providers.chunked_loss import HeadProduct, PendingLogits
from model_providers.cross_entropy import VocabularyShare
from model_providers.losses import WeightedLoss

CHUNKS = (1024, 256, 64)
REPEATS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Peak(TorchDispatchMode):
    """Bytes of storages made inside, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self._now, self.bytes = 0, 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = size = storage.nbytes()
                self._now += size
                self.bytes = max(self.bytes, self._now)
                weakref.finalize(storage, self._end, size)
        return made

    def _end(self, size: int) -> None:
        self._now -= size


def ways(words: int, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, Loss]:
    """(hidden [s 1 h], weight [v h]) -> a scalar, by name."""
    loss = WeightedLoss(VocabularyShare(words, words, solo_groups().tp))

    def naive(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ weight.t()).float()  # [s 1 v]
        return (F.cross_entropy(logits.squeeze(1), labels[0], reduction="none") * weights[0]).sum()

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return loss(hidden @ weight.t(), (labels, weights))

    def chunked(chunk: int) -> Loss:
        product = HeadProduct(chunk, sequence_parallel=False)
        return lambda hidden, weight: loss(PendingLogits(hidden, weight, product), (labels, weights))

    return {"naive": naive, "whole": whole, **{f"chunks of {chunk}": chunked(chunk) for chunk in CHUNKS}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--words", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    words = parser.parse_args()
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[words.dtype]
    hidden = torch.randn(words.tokens, 1, words.width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words.words, words.width, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, words.words, (1, words.tokens), generator=generator)
    weights = torch.full((1, words.tokens), 1.0 / words.tokens)
    table = Table("way", "peak", "of naive", "seconds", "of naive", "furthest gradient")
    first: tuple[int, float, list[torch.Tensor]] | None = None
    for name, loss in ways(words.words, labels, weights).items():
        peak_bytes, elapsed_s, gradients = measured(loss, hidden, weight)
        first = first or (peak_bytes, elapsed_s, gradients)
        table.add_row(
            name,
            f"{peak_bytes / 2**20:.0f} MiB",
            f"{peak_bytes / first[0]:.2f}",
            f"{elapsed_s:.2f}",
            f"{elapsed_s / first[1]:.2f}",
            f"{furthest(gradients, first[2]):.1e}",
        )
    table.title = f"{words.words} words, {words.tokens} tokens, width {words.width}, {words.dtype}"
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def measured(loss: Loss, *inputs: torch.Tensor) -> tuple[int, float, list[torch.Tensor]]:
    """Peak bytes, the best time of a few, and the gradients."""
    with Peak() as peak:
        gradients = list(torch.autograd.grad(loss(*inputs), inputs))
    times = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        torch.autograd.grad(loss(*inputs), inputs)
        times.append(time.perf_counter() - started_s)
    return peak.bytes, min(times), gradients


def furthest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of the largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


if __name__ == "__main__":
    main()
