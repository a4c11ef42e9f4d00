"""On CUDA: the torch kernels and Transformer Engine's give what the CPU gives, under the same names."""

import logging
from typing import Any

import pytest
import torch

from model_providers.building import solo_groups
from model_providers.chunked_loss import HeadProduct, PendingLogits
from model_providers.cross_entropy import TokenLosses, VocabularyShare
from model_providers.generation import generation_cache, next_logits
from model_providers.kernels import transformer_engine_obstacle
from model_providers.layer_plan import GPTInputs, Recompute, Targets
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import (
    Built,
    assert_same_tensors,
    batch,
    build,
    gpt2_like,
    llama_like,
    loss_and_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

NO_TE = transformer_engine_obstacle("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ["torch", pytest.param("te", marks=pytest.mark.skipif(NO_TE is not None, reason=str(NO_TE)))]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "vocab_size": 250,
}
MODELS = {
    "llama": llama_like(**SIZES, num_kv_heads=2),
    "gpt2": gpt2_like(**SIZES),
    "qk-norm, window": llama_like(**SIZES, qk_norm=True, sliding_window=5),
    "yarn": llama_like(**SIZES, rope_scaling={"kind": "yarn", "factor": 4.0, "original_max_positions": 4}),
}


def on_cuda(model: Any, kernels: str, **options: Any) -> Built:
    return build(model, device="cuda", kernels=kernels, **options)


def to_cuda(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cuda_equals_cpu(model: Any, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 without TF32: same names, same initial weights, loss and gradients within 1e-4."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    reference = build(model)
    built = on_cuda(model, kernels)
    ours, theirs = built.named_parameters(), reference.named_parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
    tokens, targets = batch(model)
    wanted_loss, wanted = loss_and_gradients(reference, tokens, targets)
    seed_streams(1, device="cuda")
    loss, gradients = loss_and_gradients(built, tokens.cuda(), Targets(*to_cuda(*targets)))
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert_same_tensors({name: gradient.cpu() for name, gradient in gradients.items()}, wanted, relative=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_documents_on_cuda_equal_cpu(kernels: str) -> None:
    model = MODELS["llama"]
    tokens, _ = batch(model)
    segments = torch.tensor([[0] * 6 + [1] * 10] * 2, dtype=torch.int32)
    wanted = build(model)(GPTInputs(tokens, segments))
    built = on_cuda(model, kernels)
    seed_streams(1, device="cuda")
    found = built(GPTInputs(tokens.cuda(), segments.cuda()))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_recompute_repeats_dropout_on_cuda(kernels: str) -> None:
    model = llama_like(**SIZES, num_kv_heads=2, hidden_dropout=0.1, attention_dropout=0.1)
    tokens, targets = batch(model)
    results = []
    for recompute in (Recompute(), Recompute("selective", modules=("core_attn", "layernorm", "mlp"))):
        built = on_cuda(model, kernels, recompute=recompute, params_dtype=torch.bfloat16)
        seed_streams(3, device="cuda")
        results.append(loss_and_gradients(built, tokens.cuda(), Targets(*to_cuda(*targets))))
    assert results[0][0] == results[1][0]
    assert_same_tensors(results[1][1], results[0][1], relative=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_in_chunks_is_that_of_whole_logits_on_cuda(dtype: torch.dtype) -> None:
    """16-bit products are summed in fp32 by `addmm` with a wider output, which torch has on CUDA alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(64, 2, 32, device="cuda", dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(128, 32, device="cuda", dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(0, 120, (64, 2), device="cuda", generator=generator)
    share = VocabularyShare(120, 128, solo_groups().tp)
    whole = torch.autograd.grad(TokenLosses.apply(hidden @ weight.t(), labels, share).sum(), (hidden, weight))
    pending = PendingLogits(hidden, weight, HeadProduct(24, sequence_parallel=False))
    chunked = torch.autograd.grad(pending.losses(labels, share).sum(), (hidden, weight))
    for found, wanted in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=8 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("kernels", KERNELS)
def test_cached_steps_on_cuda_give_the_same_logits(kernels: str) -> None:
    model = MODELS["llama"]
    built = on_cuda(model, kernels, params_dtype=torch.bfloat16)
    built.layers.eval()
    seed_streams(1, device="cuda")
    tokens = batch(model)[0].cuda()
    with torch.no_grad():
        whole = built(tokens)[..., : model.vocab_size].transpose(0, 1)
    cache = generation_cache(model, batch_size=2, max_length=20)
    parts = [
        next_logits(built.layers.values(), part, cache, model)
        for part in tokens.split([10, 1, 1, 1, 3], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=2e-2, atol=2e-2)


def test_auto_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.kernels"):
        on_cuda(MODELS["llama"], "auto", params_dtype=torch.bfloat16)
    assert len([record for record in caplog.records if record.getMessage().startswith("kernels=auto")]) == 1
