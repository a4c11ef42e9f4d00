"""megatron-core's own GPTModel, with its stock attention and norms, computes what our plan computes."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from model_providers.config import ModelConfig
from model_providers.layer_plan import Recompute
from model_providers.layout import Layout
from model_providers.mcore_config import mcore_config
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import (
    GPT2_LIKE,
    LLAMA_LIKE,
    SEQUENCE,
    assert_same_tensors,
    batch,
    build,
    loss_and_gradients,
    tensor_groups,
)

NAMES = {"decoder.final_layernorm.": "final_norm.norm.", "decoder.": "", "output_layer.": "head."}


def our_name(theirs: str) -> str:
    for prefix, ours in NAMES.items():
        if theirs.startswith(prefix):
            return ours + theirs.removeprefix(prefix)
    return theirs


def gpt_model(model: ModelConfig) -> GPTModel:
    config = mcore_config(model, Layout(), params_dtype=torch.float32, recompute=Recompute(), fuse=False)
    config.use_te_activation_func = False  # its local spec brings no activation module
    normalization = "RMSNorm" if model.normalization == "rmsnorm" else None
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization=normalization, qk_layernorm=model.qk_norm
        ),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_sequence_length,
        position_embedding_type={"learned": "learned_absolute", "rotary": "rope"}[model.position_embedding],
        rotary_base=int(model.rotary_base),
        rotary_percent=model.rotary_fraction,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )


def compare_with_gpt_model(facts: dict[str, Any]) -> None:
    model = ModelConfig(**facts)
    built = build(model, groups=tensor_groups(tp=1))
    reference, ours = gpt_model(model), built.named_parameters()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(ours[our_name(name)])
    tokens, targets = batch(model)
    places = torch.arange(SEQUENCE)[None].expand_as(tokens)
    causal = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    seed_streams(1)  # its attention forks the model-parallel stream, dropout or not
    with pytest.MonkeyPatch.context() as patch:
        # Its rotary embedding asks for the current CUDA device, whatever the device is.
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        logits = reference(tokens, places, causal)  # [b s v]
    torch.testing.assert_close(built(tokens).transpose(0, 1), logits, rtol=1e-5, atol=1e-5)
    real = logits[..., : model.known_vocab_size].transpose(1, 2)
    torch.nn.functional.cross_entropy(real, targets.labels).backward()
    _, gradients = loss_and_gradients(built, tokens, targets)
    wanted = {our_name(name): parameter.grad for name, parameter in reference.named_parameters()}
    assert_same_tensors({name: gradients[name] for name in wanted}, wanted, relative=1e-5)


MODELS = {
    "gpt-2": GPT2_LIKE,
    "llama, qk-norm, tied": LLAMA_LIKE | {"qk_norm": True},
    "llama, rotary fraction, geglu, untied": LLAMA_LIKE
    | {"rotary_fraction": 0.5, "tie_embeddings": False, "activation": "geglu"},
    "squared relu, biases": LLAMA_LIKE | {"activation": "squared_relu", "linear_bias": True},
}


@pytest.mark.ranks
@pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS)
def test_gpt_model_gives_the_same_logits_and_gradients(ranks: Any, facts: dict[str, Any]) -> None:
    ranks.run(compare_with_gpt_model, 1, facts)
