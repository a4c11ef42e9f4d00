"""Keys and values kept between steps, through the very modules that train.

One process, tensor size 1.  megatron-core's static context holds the memory and the offset; our attention
fills it with keys already rotated, and the value that flows between the layers carries it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import nn

from model_providers.config import ModelConfig
from model_providers.errors import ModelError
from model_providers.layer_plan import GPTInputs


def generation_cache(model: ModelConfig, *, batch_size: int, max_length: int) -> StaticInferenceContext:
    """Room for ``max_length`` tokens of ``batch_size`` sequences, prompts included."""
    if model.position_embedding == "learned" and max_length > model.max_sequence_length:
        raise ModelError(
            f"max_length={max_length}: the learned positions end at max_sequence_length="
            f"{model.max_sequence_length}; generate fewer tokens or shorten the prompt"
        )
    return StaticInferenceContext(max_batch_size=batch_size, max_sequence_length=max_length)


@torch.no_grad()
def next_logits(
    layers: Iterable[nn.Module], tokens: torch.Tensor, cache: StaticInferenceContext, model: ModelConfig
) -> torch.Tensor:
    """Feed the tokens that the cache has not seen, [b s], and return the logits of each, [b s v], unpadded.

    The first call takes the prompts, all of one length; the next ones usually a single token.
    """
    end = cache.sequence_len_offset + tokens.size(1)
    if end > cache.max_sequence_length:
        raise ModelError(
            f"max_length={cache.max_sequence_length}: the step ends at {end} tokens; make a larger cache"
        )
    if tokens.size(0) > cache.max_batch_size:
        raise ModelError(f"batch_size={cache.max_batch_size}: got {tokens.size(0)} sequences; make it larger")
    value: Any = GPTInputs(tokens, cache=cache)
    for layer in layers:
        value = layer(value)
    cache.increment_sequence_len_offset(tokens.size(1))
    return value[..., : model.known_vocab_size].transpose(0, 1)
