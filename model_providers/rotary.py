"""Rotary positions (Su et al. 2021, arXiv:2104.09864): frequencies, their scalings, and the turning itself.

Pairs are (i, i + d/2), as in Hugging Face's Llama and megatron-core's default.  Only the difference of two
positions enters the scores, so packed documents need no positions of their own: the mask alone keeps them
apart.
"""

import math
from typing import Any

import torch

from model_providers.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians a position turns each pair by: float32 [rotary/2]"""
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
    turns = (
        scaling.original_max_positions * frequencies / (2 * math.pi)
    )  # full turns within the original length
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn(frequencies: torch.Tensor, scaling: YarnScaling, width: int, base: float) -> torch.Tensor:
    """Dimensions that turn more than beta_fast times are kept, those below beta_slow interpolated (YaRN
    section 3.2).
    """

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
        """Positions start..end-1, in the dtype and on the device of ``like``: two of [s 1 1 rotary/2]"""
        key = (like.device, like.dtype)
        if key not in self._made or self._made[key][0].size(0) < end:
            angles = self.angles(end).to(like.device)
            cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
            self._made[key] = (cos.to(like.dtype)[:, None, None], sin.to(like.dtype)[:, None, None])
        cos, sin = self._made[key]
        return cos[start:end], sin[start:end]

    def angles(self, length: int) -> torch.Tensor:
        """float32 [s rotary/2]"""
        return torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies)

    def mcore_angles(self, length: int, device: torch.device) -> torch.Tensor:
        """As megatron-core's own attention takes them: [s 1 1 rotary], each angle twice."""
        angles = self.angles(length).to(device)
        return torch.cat((angles, angles), dim=-1)[:, None, None]


def rotate_(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """out = x turned; x and out [s b n d], cos and sin [s 1 1 rotary/2]; what lies beyond the rotary width is
    copied.
    """
    half = cos.size(-1)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out[..., half : 2 * half]).addcmul_(x1, sin)
    if 2 * half < x.size(-1):
        out[..., 2 * half :].copy_(x[..., 2 * half :])


class Rotate(torch.autograd.Function):
    """One tensor turned in two fused passes; the gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rotate_(x, out, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        rotate_(grad, grad_x, cos, -sin)
        return grad_x, None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[s b n d] -> [s b n d]"""
    return Rotate.apply(x, cos, sin)
