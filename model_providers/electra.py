"""ELECTRA as a plan of layers: embedding, generator, its guesses in the text, encoder, head of replaced tokens.

Clark et al. 2020 (arXiv:2003.10555), section 2.  Guesses are drawn with one random number for each token, which belongs
to the sample's own text, so that they do not depend on the layout.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from model_providers.building import WORD_EMBEDDINGS, Building, Construct, checkpoint
from model_providers.config import ModelConfig
from model_providers.kernels import Kernels
from model_providers.layer_plan import (
    ElectraInputs,
    ElectraValue,
    LayerPlan,
    PlanModule,
    Tie,
)
from model_providers.linears import ReplicatedLinear
from model_providers.losses import TokenLosses, VocabularyShare
from model_providers.masks import MaskMaker, positions
from model_providers.mcore_config import mcore_config
from model_providers.random_streams import derive_seed
from model_providers.rotary import RotaryTable
from model_providers.stage_modules import Block, PostNormBlock, shard_stream, word_embeddings

POSITIONS = "position_embeddings.weight"
HASH = 1_000_003  # a prime, for a number that stands for a text


class _Embedded(PlanModule):
    """Words and learned positions of the encoder's width, which generator and encoder share."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config, self.tp_group = config, groups.tp
        self.word_embeddings = word_embeddings(model, config, groups, scatters=False)
        self.position_embeddings = None
        if model.position_embedding == "learned":
            table = torch.empty(model.max_sequence_length, model.hidden_size, dtype=config.params_dtype)
            self.position_embeddings = nn.Embedding.from_pretrained(table, freeze=False)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b s] -> [s b h], under sequence parallelism a share of it"""
        hidden = self.word_embeddings(tokens.t())
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions(tokens, None).t())
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden

    def dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        with shard_stream(self):
            return F.dropout(hidden, self.config.hidden_dropout, self.training)


class GeneratorEmbedding(_Embedded):
    """Masked tokens to vectors of the generator's width."""

    takes = ElectraInputs

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any, kernels: Kernels):
        super().__init__(model, config, groups)
        assert model.electra is not None
        self.norm = _norm(kernels, config, model.hidden_size)
        self.narrow = ReplicatedLinear(
            config, model.hidden_size, model.electra.generator_hidden_size, bias=True
        )

    def apply_to(self, value: ElectraInputs) -> ElectraValue:
        hidden = self.narrow(self.dropped(self.norm(self.embedded(value.tokens))))
        return ElectraValue(hidden, None, value.tokens, value.originals, value.asked)


class Replacement(_Embedded):
    """The generator's losses, and its guesses in place of what was masked, as vectors of the encoder's width."""

    takes = ElectraValue

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: Any, kernels: Kernels, seed: int
    ):
        super().__init__(model, config, groups)
        assert model.electra is not None
        h, self.seed = model.hidden_size, seed
        self.transform = ReplicatedLinear(config, model.electra.generator_hidden_size, h, bias=True)
        self.transform_norm, self.norm = _norm(kernels, config, h), _norm(kernels, config, h)
        self.bias = nn.Parameter(
            torch.zeros(model.padded_vocab_size // groups.tp.size(), dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
        self.projection = kernels.head_linear(
            h,
            model.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=groups.tp,
        )
        self.share = VocabularyShare(model.known_vocab_size, model.padded_vocab_size, groups.tp)

    def apply_to(self, value: ElectraValue) -> ElectraValue:
        assert value.tokens is not None and value.originals is not None and value.asked is not None
        wide = self.transform_norm(self.config.activation_func(self.transform(value.hidden)))
        logits, _ = self.projection(wide, weight=self.word_embeddings.weight)
        logits = logits + self.bias  # [s b v/tp]
        guesses = self._guesses(logits.detach(), value.originals)
        tokens = torch.where(value.asked > 0, guesses, value.tokens)
        losses = TokenLosses.apply(logits, value.originals.t(), self.share)
        hidden = self.dropped(self.norm(self.embedded(tokens)))
        return ElectraValue(hidden, losses, tokens, value.originals)

    @torch.no_grad()
    def _guesses(self, logits: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        """Drawn from the generator's distribution: int64 [b s]"""
        share = self.share
        real = logits[..., : share.valid].float()  # [s b v/tp]
        top = real.amax(dim=-1) if share.valid else real.new_full(real.shape[:-1], -torch.inf)
        if share.tp > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=share.group)
        sums = torch.exp(real - top.unsqueeze(-1)).cumsum(dim=-1)  # [s b v/tp]
        own = sums[..., -1] if share.valid else torch.zeros_like(top)
        parts = [own]
        if share.tp > 1:
            parts = [torch.empty_like(own) for _ in range(share.tp)]
            dist.all_gather(parts, own.contiguous(), group=share.group)
        whole = torch.stack(parts)  # [tp s b]
        before = whole[: share.group.rank()].sum(dim=0)
        wanted = self._uniform(originals).t() * whole.sum(dim=0) - before  # [s b]
        is_last = not bool(whole[share.group.rank() + 1 :].any())
        here = (wanted >= 0) & ((wanted < own) | is_last)
        if share.valid:
            drawn = wanted.clamp_min(0).unsqueeze(-1).contiguous()
            place = torch.searchsorted(sums, drawn, right=True).squeeze(-1)
            found = place.clamp_max(share.valid - 1) + share.start
        else:
            found = torch.zeros_like(originals.t())
        found = torch.where(here, found, torch.zeros_like(found))
        if share.tp > 1:
            dist.all_reduce(found, group=share.group)
        return found.t()

    def _uniform(self, originals: torch.Tensor) -> torch.Tensor:
        """In [0, 1), of each sample by its own text: float32 [b s]"""
        powers = torch.full((originals.size(1),), HASH, device=originals.device).cumprod(0)
        texts = (originals * powers).sum(dim=1).tolist()  # wraps around
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(derive_seed("guesses", self.seed, str(text)))
            rows.append(torch.rand(originals.size(1), generator=generator))
        return torch.stack(rows).to(originals.device)


class ElectraBlock(Block):
    takes = ElectraValue


class ElectraPostNormBlock(PostNormBlock):
    takes = ElectraValue


class ElectraNorm(PlanModule):
    takes = ElectraValue

    def __init__(self, config: TransformerConfig, kernels: Kernels):
        super().__init__()
        self.norm = _norm(kernels, config, config.hidden_size)

    def apply_to(self, value: ElectraValue) -> ElectraValue:
        return value._replace(hidden=self.norm(value.hidden))


class ReplacedHead(PlanModule):
    """Whether a token was replaced: (logits [s b], the generator's losses [s b], what was replaced, bool [b s])."""

    takes = ElectraValue

    def __init__(self, model: ModelConfig, config: TransformerConfig, groups: Any):
        super().__init__()
        self.config, self.tp_group = config, groups.tp
        self.dense = ReplicatedLinear(config, model.hidden_size, model.hidden_size, bias=True)
        self.replaced = ReplicatedLinear(config, model.hidden_size, 1, bias=True)

    def apply_to(self, value: ElectraValue) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert value.losses is not None and value.tokens is not None and value.originals is not None
        logits = self.replaced(self.config.activation_func(self.dense(value.hidden)))  # [s b 1]
        if self.config.sequence_parallel:
            logits = tensor_parallel.gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return logits.squeeze(-1), value.losses, value.tokens != value.originals


class ReplacedLoss:
    """Targets are labels and weights [b s] of what the generator is asked, and weights [b] of the samples."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, output: Any, targets: Any) -> torch.Tensor:
        logits, losses, replaced = output
        _, asked, samples = targets
        told = F.binary_cross_entropy_with_logits(logits.float(), replaced.t().float(), reduction="none")
        per_sample = told.mean(dim=0)  # [b]
        return (losses * asked.t()).sum() + self.weight * (per_sample * samples).sum()


def plan(building: Building) -> LayerPlan:
    """Generator and encoder."""
    model, groups, config, chosen = building.model, building.groups, building.config, building.kernels
    assert model.electra is not None
    small, masks = model.generator, MaskMaker()
    small_config = mcore_config(
        small,
        building.layout,
        params_dtype=config.params_dtype,
        recompute=building.recompute,
        fuse=chosen.fuse,
    )

    def rotary(of: ModelConfig) -> RotaryTable | None:
        return RotaryTable(of) if of.position_embedding == "rotary" else None

    turns, small_turns = rotary(model), rotary(small)
    kind = ElectraPostNormBlock if model.norms_after else ElectraBlock
    modules: dict[str, Construct] = {"embedding": partial(GeneratorEmbedding, model, config, groups, chosen)}
    for index in range(small.num_layers):
        modules[f"generator.{index}"] = partial(
            kind,
            small_config,
            groups,
            building.kernels_of(index, small.num_layers),
            index,
            small_turns,
            masks,
            is_causal=False,
        )
    modules["replacement"] = partial(Replacement, model, config, groups, chosen, building.seed)
    for index in range(model.num_layers):
        modules[f"layers.{index}"] = partial(
            kind,
            config,
            groups,
            building.kernels_of(index, model.num_layers),
            index,
            turns,
            masks,
            is_causal=False,
        )
    if not model.norms_after:
        modules["final_norm"] = partial(ElectraNorm, config, chosen)
    modules["head"] = partial(ReplacedHead, model, config, groups)
    ties: tuple[Tie, ...] = (Tie("embedding", WORD_EMBEDDINGS, "replacement", WORD_EMBEDDINGS),)
    if model.position_embedding == "learned":
        ties += (Tie("embedding", POSITIONS, "replacement", POSITIONS),)
    return LayerPlan(
        layers=building.layers(modules, ties, checkpointable=("generator.", "layers.")),
        ties=ties,
        loss=ReplacedLoss(model.electra.discriminator_weight),
        inputs_type=ElectraInputs,
        value_type=ElectraValue,
        recompute=building.recompute,
        checkpoint_function=checkpoint,
    )


def _norm(kernels: Kernels, config: TransformerConfig, width: int) -> nn.Module:
    return kernels.norm(config=config, hidden_size=width, eps=config.layernorm_epsilon)
