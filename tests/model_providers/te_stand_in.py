"""As much of Transformer Engine's FP8 as its state machine is, on any device: contexts, delayed scales, kept weights.

Written after transformer_engine/pytorch: quantization.py (FP8GlobalStateManager, autocast), module/base.py
(init_fp8_metadata, prepare_forward), module/linear.py (who updates scales in a backward pass).  Products are those of
numbers that went through eight bits and back, so a scale that changes at the wrong moment changes the loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from model_providers.fp8.formats import E4M3, E5M2, Format, cast
from model_providers.fp8.transformer_engine import Library
from model_providers.kernels import Kernels, torch_kernels
from model_providers.linears import ColumnLinear, RowLinear


class Manager:
    """FP8GlobalStateManager."""

    enabled, depth, is_first, num_updates = False, 0, False, 0
    recipe_and_group: Any = None
    registered: ClassVar[list["StandIn"]] = []

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return False, "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        return False, "Device compute capability 10.0 or higher required for MXFP8 execution."

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        first, cls.is_first = cls.is_first, False
        return first

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        cls.num_updates += 1
        way, form = ("fwd", E4M3) if forward else ("bwd", E5M2)
        for linear in cls.registered:
            _update(linear.fp8_meta[f"scaling_{way}"], form, cls.recipe_and_group)

    @classmethod
    @contextmanager
    def context(cls, *, enabled: bool, recipe: Any, group: Any) -> Iterator[None]:
        before = cls.enabled, cls.is_first
        cls.enabled, cls.recipe_and_group = enabled, (recipe, group)
        if cls.depth == 0:
            cls.is_first = True
        cls.depth += 1
        yield
        cls.enabled, cls.is_first = before
        cls.depth -= 1
        if enabled and cls.depth == 0 and torch.is_grad_enabled():
            cls.reduce_and_update_fp8_tensors(forward=True)


def _update(state: Any, form: Format, recipe_and_group: Any) -> None:
    recipe, group = recipe_and_group
    history = state.amax_history
    if dist.is_initialized() and isinstance(group, dist.ProcessGroup):
        seen = history[0].clone()
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
        history[0].copy_(seen)
    largest = history.amax(dim=0)
    is_known = (largest > 0) & torch.isfinite(largest)
    state.scale.copy_(torch.where(is_known, form.largest / largest / 2**recipe.margin, state.scale))
    history.copy_(history.roll(-1, 0))
    history[0].zero_()


class DelayedScaling(SimpleNamespace):
    def __init__(self, margin: int = 0, amax_history_len: int = 1024):
        super().__init__(margin=margin, amax_history_len=amax_history_len)


class Float8CurrentScaling(SimpleNamespace): ...


class Float8BlockScaling(SimpleNamespace): ...


class _Through(torch.autograd.Function):
    """Numbers as eight bits hold them; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (cast(x.float() * scale, E4M3).float() / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gradient(torch.autograd.Function):
    """The output's gradient in eight bits; the first module of a context updates scales, as Transformer Engine's."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, linear: "StandIn") -> torch.Tensor:
        ctx.linear, ctx.updates = linear, linear.manager.is_first_fp8_module()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        state = ctx.linear.fp8_meta["scaling_bwd"]
        note(state, 0, grad)
        scale = state.scale[0].clone()
        if ctx.updates:
            ctx.linear.manager.reduce_and_update_fp8_tensors(forward=False)
        return (cast(grad.float() * scale, E5M2).float() / scale).to(grad.dtype), None


def note(state: Any, which: int, x: torch.Tensor) -> None:
    """Kernels add to the largest value with an atomic maximum (common/cast/fp8/quantize_fp8.cuh)."""
    state.amax_history[0, which] = torch.maximum(state.amax_history[0, which], x.detach().abs().max().float())


class StandIn(torch.nn.Module):
    """Before one of our linears in the list of bases; the flags are megatron-core's TELinear's."""

    manager: Any

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        self.fp8_meta: dict[str, Any] = {}
        self.is_first_microbatch, self.disable_parameter_transpose_cache = True, False
        self.kept: torch.Tensor | None = None
        self.num_quantised = 0  # times the weight was

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        recipe, _ = self.manager.recipe_and_group
        if isinstance(recipe, DelayedScaling) and "scaling_fwd" not in self.fp8_meta:
            window, device = recipe.amax_history_len, self.weight.device
            for way, size in (("fwd", 3), ("bwd", 2)):
                self.fp8_meta[f"scaling_{way}"] = SimpleNamespace(
                    scale=torch.ones(size, device=device),
                    amax_history=torch.zeros(window, size, device=device),
                )

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **named: Any) -> Any:
        if not self.manager.enabled or not isinstance(self.manager.recipe_and_group[0], DelayedScaling):
            return super()._forward_impl(input, weight, *args, **named)  # type: ignore[misc]
        self.init_fp8_metadata()
        if self not in self.manager.registered:
            self.manager.registered.append(self)
        state = self.fp8_meta["scaling_fwd"]
        note(state, 0, input)
        x = _Through.apply(input, state.scale[0].clone())
        output = super()._forward_impl(x, self._weight(weight, state), *args, **named)  # type: ignore[misc]
        return _Gradient.apply(output, self)

    def _weight(self, weight: torch.Tensor, state: Any) -> torch.Tensor:
        is_first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        self.is_first_microbatch = False
        if is_first is not False or self.kept is None:
            self.num_quantised += 1
            note(state, 1, weight)
            fresh = _Through.apply(weight, state.scale[1].clone())
            self.kept = None if is_first is None else fresh.detach()
            return fresh
        return weight + (self.kept - weight).detach()

    def get_extra_state(self) -> torch.Tensor:
        """Transformer Engine's are pickles in bytes, of a size of their own."""
        return torch.full((3 + 2 * len(self.fp8_meta),), 7, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, (
            "it is never in our files, and what others put there is left"
        )  # None: megatron-core's


def stand_in() -> tuple[Library, Kernels]:
    """A library with a state of its own, and kernels whose linears ask it."""
    own = type("OwnManager", (Manager,), {"registered": []})
    column = type("StandInColumn", (StandIn, ColumnLinear), {"manager": own})
    row = type("StandInRow", (StandIn, RowLinear), {"manager": own})
    recipes = {one.__name__: one for one in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling)}
    kernels = torch_kernels()._replace(
        name="stand-in", column_linear=column, row_linear=row, is_transformer_engine=True
    )
    return Library(SimpleNamespace(**recipes), own, own.context), kernels
