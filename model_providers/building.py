"""What the providers of all families share: from facts and a layout to built layers with their weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from model_providers import mcore_on_cpu
from model_providers.chunked_loss import HeadProduct
from model_providers.config import ModelConfig
from model_providers.cost import LayerCost, layer_costs
from model_providers.dispatch import Nodes
from model_providers.errors import ModelError
from model_providers.fp8.choice import ToEightBits, choose_fp8
from model_providers.fp8.config import Fp8Config
from model_providers.fp8.linears import name_linears
from model_providers.fp8.transformer_engine import name_blocks
from model_providers.initial import draw_weights
from model_providers.kernels import Kernels, choose_kernels
from model_providers.layer_plan import LossOfHead, PlannedLayer, Recompute, Tie
from model_providers.layout import Layout, TensorPlace, layout_problems
from model_providers.mcore_config import mcore_config

WORD_EMBEDDINGS = "word_embeddings.weight"
NO_RECOMPUTE = Recompute()

Construct = Callable[[], nn.Module]


class Building(NamedTuple):
    """What the layers of a model are made with."""

    model: ModelConfig
    layout: Layout
    groups: Any  # a ProcessGroupCollection
    config: TransformerConfig
    kernels: Kernels
    costs: Sequence[LayerCost]
    seed: int
    device: torch.device
    recompute: Recompute
    nodes: Nodes | None  # how ranks that share experts lie on machines
    fp8: Fp8Config | None
    to_eight_bits: ToEightBits | None  # of the blocks that are in FP8
    chunk_tokens: int | None  # of the head's product and its loss; None: all tokens at once

    @classmethod
    def prepare(
        cls,
        model: ModelConfig,
        layout: Layout,
        groups: Any,
        *,
        seed: int,
        sequence_length: int,
        target_length: int | None = None,
        params_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        recompute: Recompute = NO_RECOMPUTE,
        nodes: Nodes | None = None,
        fp8: Fp8Config | None = None,
        chunk_tokens: int | None = None,
    ) -> Self:
        """``groups``: a ProcessGroupCollection with tp, cp and pp, and with experts all that concerns them; or
        ``solo_groups()`` for a single process.  Of two stacks ``sequence_length`` is the encoder's, and
        ``target_length`` the decoder's.
        """
        problems = layout_problems(model, layout, sequence_length, target_length)
        if problems:
            raise ModelError("; ".join(problems))
        device = torch.device(device)
        mcore_on_cpu.install(device.type)
        chosen = choose_kernels(kernels, device.type, params_dtype)
        config = mcore_config(
            model, layout, params_dtype=params_dtype, recompute=recompute.checked(), fuse=chosen.fuse
        )
        costs = layer_costs(
            model,
            sequence_length,
            target_length=target_length,
            recompute=recompute.mode,
            recompute_modules=recompute.modules,
            tp=layout.tp,
            etp=layout.expert_tp,
            sequence_parallel=layout.shards_sequence,
            bytes_per_value=params_dtype.itemsize,
            chunked_loss=chunk_tokens is not None,
        )
        eight_bits = None
        if fp8 is not None:
            recomputes = recompute.repeats_linears
            eight_bits = choose_fp8(fp8, chosen, device, groups, recomputes=recomputes)
        return cls(
            model,
            layout,
            groups,
            config,
            chosen,
            costs,
            seed,
            device,
            recompute,
            nodes,
            fp8,
            eight_bits,
            chunk_tokens,
        )

    def kernels_of(self, index: int, num_blocks: int) -> Kernels:
        """Those of block ``index`` in a stack of ``num_blocks``; what looks ahead comes behind them, not in FP8."""
        if self.fp8 is None or not self.fp8.is_fp8_block(index, num_blocks):
            return self.kernels
        assert self.to_eight_bits is not None
        return self.to_eight_bits(self.kernels)

    def loss_of_head(self, loss: Callable[[Any, Any], torch.Tensor]) -> LossOfHead | None:
        """What a head needs to make its loss in chunks, if it shall."""
        if self.chunk_tokens is None:
            return None
        return LossOfHead(loss, HeadProduct(self.chunk_tokens, self.layout.shards_sequence))

    def layers(
        self, modules: Mapping[str, Construct], ties: tuple[Tie, ...], *, checkpointable: tuple[str, ...]
    ) -> tuple[PlannedLayer, ...]:
        """``checkpointable``: how the names begin of those that full recompute forgets."""
        finish = _Finish(
            self.model, self.seed, tensor_place(self.model, self.layout, self.groups), ties, self.device
        )
        return tuple(
            PlannedLayer(name, partial(finish.build, name, construct), cost, name.startswith(checkpointable))
            for (name, construct), cost in zip(modules.items(), self.costs, strict=True)
        )


def tensor_place(model: ModelConfig, layout: Layout, groups: Any) -> TensorPlace:
    """Which share of each parameter this rank holds."""
    dense = TensorPlace(tp=layout.tp, tp_rank=groups.tp.rank())
    if model.moe is None:
        return dense
    return dense._replace(
        etp=layout.expert_tp, etp_rank=groups.expt_tp.rank(), ep=layout.ep, ep_rank=groups.ep.rank()
    )


class _Finish(NamedTuple):
    """From a constructed module to one with its weights, on its device."""

    model: ModelConfig
    seed: int
    place: TensorPlace
    ties: tuple[Tie, ...]
    device: torch.device

    def build(self, name: str, construct: Any) -> nn.Module:
        module = construct()
        name_linears(module, name)
        name_blocks(module, name)
        tied = {
            tie.user_parameter: f"{tie.owner}.{tie.owner_parameter}" for tie in self.ties if tie.user == name
        }
        draw_weights(module, self.model, self.seed, name, self.place, tied=tied)
        if self.model.draws_in_training:
            module.stream = name
        return module.to(self.device)


def checkpoint(function: Any, *tensors: torch.Tensor) -> Any:
    """Run ``function`` without keeping its activations, and again in the backward pass with equal streams."""
    return tensor_parallel.checkpoint(function, False, *tensors)


class _SoloGroup:
    """As much of a process group of one as megatron-core's layers ask for; nothing is initialised."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class SoloGroups(NamedTuple):
    """What megatron-core's layers ask for by these names."""

    tp: Any
    cp: Any
    pp: Any
    ep: Any
    expt_tp: Any
    expt_dp: Any
    tp_ep: Any
    tp_cp: Any
    tp_dp_cp: Any


def solo_groups() -> SoloGroups:
    """The groups of a single process: tests, generation, benchmarks."""
    return SoloGroups(*(_SoloGroup() for _ in SoloGroups._fields))
