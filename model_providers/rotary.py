"""Rotary positions (Su et al. 2021, arXiv:2104.09864): frequencies, their scalings, and the turning itself.

Pairs are (i, i + d/2), as in Hugging Face's Llama and megatron-core's default.  Only the difference of two
positions enters the scores, so packed documents need no positions of their own: the mask alone keeps them
apart.
"""

import math
from typing import Any

import torch

from model_providers.compiled import compiled_on_cuda
from model_providers.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians by which each position turns each pair: float32 [w/2]"""
    width, base, scaling = model.rotary_width, model.rotary_base, model.rope_scaling
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, scaling, width, base)
    return frequencies


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Wavelengths above original/low are divided by factor, those below original/high kept, a linear ramp in
    their inverse between (github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling).
    """
    # Full turns within the original length.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn(frequencies: torch.Tensor, scaling: YarnScaling, width: int, base: float) -> torch.Tensor:
    """Pairs that turn more than beta_fast times are kept, below beta_slow interpolated (YaRN section 3.2)."""

    def dimension_that_turns(times: float) -> float:
        return width * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_that_turns(scaling.beta_fast), dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    interpolate = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return frequencies / scaling.factor * interpolate + frequencies * (1.0 - interpolate)


class RotaryTable:
    """Cosines and sines up to the longest position asked for, shared by all layers of a rank.

    Not a module: it has no weights, and must not appear in a state dict.
    """

    def __init__(self, model: ModelConfig):
        self.frequencies = inverse_frequencies(model)
        self.scale = model.rope_scaling.cos_sin_scale if isinstance(model.rope_scaling, YarnScaling) else 1.0
        self._made: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def cos_sin(self, start: int, end: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions start..end-1, in the dtype and on the device of ``like``: [s 1 1 w] and [s 1 1 w/2]

        w is the rotary width; the cosine stands twice because it multiplies both halves.
        """
        key = (like.device, like.dtype)
        if key not in self._made or self._made[key][0].size(0) < end:
            self._made[key] = self._make(end, like)
        cos, sin = self._made[key]
        return cos[start:end], sin[start:end]

    @torch.inference_mode(False)  # first made in an evaluation, it serves training too
    def _make(self, end: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(end, dtype=torch.float32), self.frequencies)[:, None, None]
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale  # [s 1 1 w/2]
        return torch.cat((cos, cos), dim=-1).to(like.device, like.dtype), sin.to(like.device, like.dtype)


def turn(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """out = x turned by the angles, or a copy without; x and out [s b ... d], cos [s 1 1 w], sin [s 1 1 w/2].

    Three passes, and the half-width ones in place: (x1 cos - x2 sin, x2 cos + x1 sin).
    """
    if cos is None or sin is None:
        out.copy_(x)
        return
    shape = (x.size(0), *[1] * (x.dim() - 2), -1)
    cos, sin = cos.view(shape), sin.view(shape)
    half = sin.size(-1)
    torch.mul(x[..., : 2 * half], cos, out=out[..., : 2 * half])
    out[..., :half].addcmul_(x[..., half : 2 * half], sin, value=-1)
    out[..., half : 2 * half].addcmul_(x[..., :half], sin)
    if 2 * half < x.size(-1):
        out[..., 2 * half :] = x[..., 2 * half :]


def turned(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """The same as a tensor of its own, in the one expression that compilers like."""
    if cos is None or sin is None:
        return x
    shape = (x.size(0), *[1] * (x.dim() - 2), -1)
    cos, sin = cos.view(shape), sin.view(shape)
    half = sin.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos = cos[..., :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


_turned = compiled_on_cuda(turned)


class Rotate(torch.autograd.Function):
    """One tensor turned; its gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.cos, ctx.sin = cos, sin
        if _turned.pays(x):
            return _turned(x.detach(), cos, sin)
        out = torch.empty_like(x)
        turn(x, out, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if _turned.pays(grad):
            return _turned(grad, ctx.cos, -ctx.sin), None, None
        grad_x = torch.empty_like(grad)
        turn(grad, grad_x, ctx.cos, -ctx.sin)
        return grad_x, None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[s b n d] -> [s b n d]"""
    return Rotate.apply(x, cos, sin)
