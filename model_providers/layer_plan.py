"""A model as a list of layers, and the named value that flows between them.

A provider returns this plan, not a module: the ZeRO engine builds all of it, a pipeline engine builds its
share, and the names of parameters ("layers.3.mlp.linear_fc1.weight") come from the plan, so they do not
depend on either.

Inside a process a value is a NamedTuple.  Between pipeline stages it is what ``to_wire`` makes of it: a
tensor, or a tuple of tensors in which every floating-point tensor needs its gradient and no integer tensor
does.  A layer called with the wire form answers in the wire form, so an engine that only moves tensors can
call the layers directly.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import nn

from model_providers.activation_memory import RECOMPUTE_MODULES
from model_providers.chunked_loss import HeadProduct
from model_providers.cost import LayerCost
from model_providers.errors import ModelError
from model_providers.random_streams import begin_layer


class GPTInputs(NamedTuple):
    """What the first layer takes."""

    tokens: torch.Tensor  # int64 [b s]
    segments: torch.Tensor | None = None  # int32 [b s]: documents by number; attention stays inside one
    cache: Any = None  # keys and values of earlier tokens, in generation only; never on the wire

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        return cls(parts[torch.int64][0], *parts[torch.int32])


class BERTInputs(NamedTuple):
    """What the first layer of an encoder takes."""

    tokens: torch.Tensor  # int64 [b s]
    types: torch.Tensor | None = None  # int64 [b s]: first or second sentence
    segments: torch.Tensor | None = None  # int32 [b s]: attention stays inside one, and padding is one

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        tokens, *types = parts[torch.int64]
        return cls(tokens, next(iter(types), None), next(iter(parts[torch.int32]), None))


class ElectraInputs(NamedTuple):
    """What a generator and a discriminator take."""

    tokens: torch.Tensor  # int64 [b s], masked
    originals: torch.Tensor  # int64 [b s]
    asked: torch.Tensor  # int32 [b s], 1 where the generator is asked

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        tokens, originals = parts[torch.int64]
        return cls(tokens, originals, parts[torch.int32][0])


class ElectraValue(NamedTuple):
    """What flows through the generator, and with its losses through the discriminator."""

    hidden: torch.Tensor  # [s b g], in the discriminator [s b h]; under sequence parallelism a share of it
    losses: torch.Tensor | None = None  # float32 [s b], the generator's, once it has said its guesses
    tokens: torch.Tensor | None = None  # int64 [b s]: masked, then with its guesses
    originals: torch.Tensor | None = None  # int64 [b s]
    asked: torch.Tensor | None = None  # int32 [b s], until then

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        floats = _floats(parts)
        hidden = next(tensor for tensor in floats if tensor.dim() == 3)
        losses = next((tensor for tensor in floats if tensor.dim() == 2), None)
        tokens, originals = parts[torch.int64]
        return cls(hidden, losses, tokens, originals, next(iter(parts[torch.int32]), None))


class T5Inputs(NamedTuple):
    """What the first layer of two stacks takes."""

    tokens: torch.Tensor  # int64 [b s], the encoder's
    targets: torch.Tensor  # int64 [b t], the decoder's
    segments: torch.Tensor | None = None  # int32 [b s]: attention stays inside one, and padding is one

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        tokens, targets = parts[torch.int64]
        return cls(tokens, targets, next(iter(parts[torch.int32]), None))


class T5Value(NamedTuple):
    """What flows through the encoder and then the decoder.

    ``memory`` goes to every layer of the decoder, whichever stage it is on, and its gradient comes back the same way.
    """

    hidden: torch.Tensor  # [s b h], in the decoder [t b h]; under sequence parallelism a share of it
    memory: torch.Tensor | None = None  # [s b h], what the encoder made: in the decoder
    targets: torch.Tensor | None = None  # int64 [b t], until the decoder's embedding
    segments: torch.Tensor | None = None  # int32 [b s], as in T5Inputs

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        parts = _by_dtype(wire)
        hidden, *memory = _floats(parts)
        return cls(
            hidden,
            next(iter(memory), None),
            next(iter(parts[torch.int64]), None),
            next(iter(parts[torch.int32]), None),
        )


class GPTValue(NamedTuple):
    """What flows from layer to layer."""

    hidden: torch.Tensor  # [s b h], under sequence parallelism [s/tp b h]
    segments: torch.Tensor | None = None  # int32 [b s], as in GPTInputs
    cache: Any = None
    tokens: torch.Tensor | None = None  # int64 [b s], where layers look ahead (multi-token prediction)
    ahead: torch.Tensor | None = None  # [depths*s b h]: what those layers made, one depth after the other

    def to_wire(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return _to_wire(self)

    @classmethod
    def from_wire(cls, wire: "Wire") -> Self:
        """Parts are told apart by their number formats, so an absent one leaves no gap."""
        parts = _by_dtype(wire)
        hidden, *ahead = _floats(parts)
        return cls(
            hidden,
            segments=next(iter(parts[torch.int32]), None),
            tokens=next(iter(parts[torch.int64]), None),
            ahead=next(iter(ahead), None),
        )


Inputs = GPTInputs | BERTInputs | ElectraInputs | T5Inputs
Value = GPTValue | ElectraValue | T5Value
Wire = torch.Tensor | Sequence[torch.Tensor]


class Targets(NamedTuple):
    """What the loss takes beside the last layer's output; a plain tuple of the two will do."""

    labels: torch.Tensor  # int64 [b s]
    weights: torch.Tensor  # float32 [b s]; the loss is a weighted sum: the weights decide which mean it is


WITH_LINEARS = {"mlp", "moe", "shared_experts", "mla_up_proj"}  # of RECOMPUTE_MODULES


class Recompute(NamedTuple):
    """What the forward pass forgets and the backward pass computes again.

    ``selective``: ``modules``, inside the layers.  ``full``: whole layers in groups of ``every``, which the engine does
    with the plan's ``checkpoint_function``.  ``offload_above_bytes``: of what layers keep, larger tensors wait on the
    host; None: nothing does.
    """

    mode: Literal["none", "selective", "full"] = "none"
    every: int = 1
    modules: tuple[str, ...] = ("core_attn",)  # of RECOMPUTE_MODULES
    offload_above_bytes: int | None = None

    @property
    def repeats_linears(self) -> bool:
        """Whether linear layers run once more, after a pass without gradients."""
        return self.mode == "full" or (self.mode == "selective" and bool(WITH_LINEARS & set(self.modules)))

    def checked(self) -> "Recompute":
        if self.mode not in ("none", "selective", "full"):
            raise ModelError(f"recompute.mode={self.mode}: unknown; choose none, selective or full")
        if self.every < 1:
            raise ModelError(f"recompute.every={self.every}: counts layers; use 1 or more")
        unknown = [name for name in self.modules if name not in RECOMPUTE_MODULES]
        if unknown:
            raise ModelError(
                f"recompute.modules={unknown[0]}: unknown; choose among {', '.join(RECOMPUTE_MODULES)}"
            )
        return self


class PlannedLayer(NamedTuple):
    """``build`` makes the module with the same weights at every call and in every layout, and touches no
    global random state.
    """

    name: str  # the prefix of its parameters' names: "embedding", "layers.0", ..., "final_norm", "mtp.0", "head"
    build: Callable[[], nn.Module]
    cost: LayerCost
    checkpointable: bool  # may be forgotten under full recompute


class Tie(NamedTuple):
    """Two parameters that are one: the same object where both layers live in one module, else replicas that
    the engine keeps equal.  Both start with the same values.
    """

    owner: str
    owner_parameter: str
    user: str
    user_parameter: str


class LossOfHead(NamedTuple):
    """How a head makes its loss itself."""

    function: Callable[[Any, Any], torch.Tensor]  # the plan's
    product: HeadProduct


class LayerPlan(NamedTuple):
    layers: tuple[PlannedLayer, ...]
    ties: tuple[Tie, ...]
    loss: Callable[[Any, Any], torch.Tensor]  # (last output, Targets) -> scalar, float32
    inputs_type: type[Inputs]
    value_type: type[Value]
    recompute: Recompute
    checkpoint_function: Callable[..., Any]  # (function, *tensors): reentrant, restores every random stream
    head_makes_loss: bool = False  # given targets too, so that logits are never there as a whole


def _to_wire(value: Inputs | Value) -> torch.Tensor | tuple[torch.Tensor, ...]:
    assert getattr(value, "cache", None) is None, "a cache of keys and values does not travel between stages"
    parts = tuple(part for part in value if part is not None)
    return parts[0] if len(parts) == 1 else parts


def _by_dtype(wire: Wire) -> dict[torch.dtype, list[torch.Tensor]]:
    parts: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for tensor in (wire,) if isinstance(wire, torch.Tensor) else wire:
        parts[tensor.dtype].append(tensor)
    return parts


def _floats(parts: dict[torch.dtype, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Those of every floating-point format, in the order in which the formats came."""
    return [tensor for dtype, tensors in parts.items() if dtype.is_floating_point for tensor in tensors]


EXTRA_STATE = "_extra_state"  # torch's name for what a module keeps beside tensors


class PlanModule(nn.Module):
    """A layer of a plan: subclasses map value to value in ``apply_to``; ``forward`` takes the wire form too.

    It can stand before another module class in the list of bases, such as megatron-core's TransformerLayer.
    """

    takes: type[Inputs] | type[Value] = GPTValue
    stream: str | None = None  # the layer's name, where it draws random numbers in training
    precision: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around its work

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(drop_extra_state)
        self.register_load_state_dict_pre_hook(ignore_extra_state)
        self.register_load_state_dict_post_hook(miss_no_extra_state)

    def apply_to(self, value: Any) -> Any:
        raise NotImplementedError

    def loss_of(self, value: Any, targets: Any) -> torch.Tensor:
        """Of a head that makes it: a scalar."""
        raise NotImplementedError

    def forward(self, value: Any, *targets: torch.Tensor) -> Any:
        if self.stream is not None and self.training:
            begin_layer(self.stream)
        if targets:
            whole = value if isinstance(value, self.takes) else self.takes.from_wire(value)
            return self.loss_of(whole, targets)
        if isinstance(value, self.takes):
            return self.apply_to(value)
        output = self.apply_to(self.takes.from_wire(value))
        return output.to_wire() if isinstance(output, GPTValue | ElectraValue | T5Value) else output


def drop_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """No ``_extra_state`` in files: linears of megatron-core put None there, which DeepSpeed's checkpoints clone, and
    those of Transformer Engine pickled scales, whose size and kind depend on the recipe (`fp8` keeps what matters).
    """
    for name in extra_states(state, prefix):
        del state[name]


def ignore_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Nor is that of other files taken: weights in 16 bits load into eight-bit layers, and the other way round."""
    drop_extra_state(module, state, prefix, None)


def miss_no_extra_state(module: nn.Module, keys: Any) -> None:
    """Strict loading asks for it of every module that could take it."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(EXTRA_STATE)]


def extra_states(state: dict[str, Any], prefix: str) -> list[str]:
    return [name for name in state if name.startswith(prefix) and name.endswith(EXTRA_STATE)]
