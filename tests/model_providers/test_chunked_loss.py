"""The loss without the logits is the loss of the logits, with all its gradients, and no tensor of it is large."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_providers.building import solo_groups
from model_providers.chunked_loss import ChunkedLosses, HeadProduct, PendingLogits
from model_providers.config import ModelConfig
from model_providers.cross_entropy import VocabularyShare
from model_providers.layer_plan import BERTInputs, T5Inputs
from model_providers.layout import Layout
from model_providers.loss_chunks import AUTO_CHUNK_TOKENS, chunk_tokens, tokens_of_a_chunk
from model_providers.losses import WeightedLoss
from model_providers.partial_gradients import sum_partial_gradients
from model_providers.presets import get_preset
from model_providers.random_streams import seed_streams
from tests.model_providers.plans import (
    LLAMA_LIKE,
    SEQUENCE,
    Built,
    assert_same_tensors,
    batch,
    build,
    llama_like,
    tensor_groups,
    undivided,
)

S, B, H, VOCAB, PADDED = 6, 2, 5, 13, 16
CHUNKS = [1, 5, 12, 100]  # of the 12 tokens: one by one, uneven, all, more than there are


def share() -> VocabularyShare:
    return VocabularyShare(VOCAB, PADDED, solo_groups().tp)


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [s b h], weight [v h], bias [v], labels [s b]; the padded rows are larger than any real one."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((S, B, H), (PADDED, H), (PADDED,))
    )
    weight[VOCAB:], bias[VOCAB:] = 50.0, 100.0
    labels = torch.randint(0, VOCAB, (S, B), generator=generator)
    labels[0, 0], labels[1, 0] = 0, VOCAB - 1
    made = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return made[0], made[1], made[2], labels


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_every_gradient_is_exact(chunk: int, has_bias: bool) -> None:
    hidden, weight, bias, labels = problem(torch.float64)
    product = HeadProduct(chunk, sequence_parallel=False)

    def losses(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return ChunkedLosses.apply(hidden, weight, bias[0] if bias else None, labels, share(), product)

    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    assert torch.autograd.gradcheck(losses, inputs)
    logits = hidden @ weight.t() + (bias if has_bias else 0.0)
    plain = F.cross_entropy(logits[..., :VOCAB].permute(1, 2, 0), labels.t(), reduction="none").t()
    torch.testing.assert_close(losses(*inputs), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, weight, _, labels = problem(torch.float32)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    PendingLogits(hidden, weight, HeadProduct(5, False)).losses(labels, share()).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_get_the_gradient_of_a_sum_in_fp32(dtype: torch.dtype) -> None:
    """Against one chunk: rounding each chunk's product to 16 bit before the sum would show."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 1, 8, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (64, 1), generator=generator)
    found = []
    for chunk in (1, 64):
        weight = torch.randn(PADDED, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        losses = PendingLogits(hidden, weight, HeadProduct(chunk, False)).losses(labels, share())
        losses.sum().backward()
        assert losses.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == dtype
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---- of models

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "looks ahead": {"mtp": {"depth": 2, "loss_weight": 0.5}},
    "bert": {"bert": {}, "num_kv_heads": None, "position_embedding": "learned", "normalization": "layernorm"},
    "t5": {"t5": {"num_encoder_layers": 1}, "num_kv_heads": None, "position_embedding": "relative"},
}


def inputs_and_targets(model: ModelConfig) -> tuple[Any, Any]:
    """With weights that differ, and a second task where there is a head for one."""
    tokens, (labels, _) = batch(model)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))
    weights[0, 3:6] = 0.0
    if model.bert is not None:
        sentences = torch.tensor([0, 1]), torch.tensor([0.5, 0.0])
        return BERTInputs(tokens), (labels, weights, *sentences)
    return (T5Inputs(tokens, tokens) if model.t5 is not None else tokens), (labels, weights)


def loss_and_gradients(built: Built, inputs: Any, targets: Any) -> tuple[float, dict[str, torch.Tensor]]:
    seed_streams(1)
    value: Any = inputs
    *before, head = built.layers.values()
    for layer in before:
        value = layer(value)
    loss = head(value, *targets) if built.plan.head_makes_loss else built.plan.loss(head(value), targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters().items()}
    return loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def of_a_model(
    facts: dict[str, Any], dtype: torch.dtype, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model = ModelConfig(**LLAMA_LIKE | facts)
    built = build(model, target_length=SEQUENCE if model.t5 else None, params_dtype=dtype, **options)
    return loss_and_gradients(built, *inputs_and_targets(model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_gets_the_loss_and_gradients_of_whole_logits(kind: str) -> None:
    wanted_loss, wanted = of_a_model(MODELS[kind], torch.float32)
    loss, found = of_a_model(MODELS[kind], torch.float32, chunk_tokens=5)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_tensors(found, wanted, 2e-6)


@pytest.mark.parametrize("kind", ["tied", "bert"])
def test_in_bf16_it_rounds_where_whole_logits_round(kind: str) -> None:
    wanted_loss, wanted = of_a_model(MODELS[kind], torch.bfloat16)
    loss, found = of_a_model(MODELS[kind], torch.bfloat16, chunk_tokens=5)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_tensors(found, wanted, 0.02)


def test_without_targets_a_head_gives_logits_still() -> None:
    model = llama_like()
    tokens, _ = batch(model)
    whole, chunked = build(model), build(model, chunk_tokens=5)
    assert torch.equal(whole(tokens), chunked(tokens))
    assert chunked.plan.head_makes_loss and not whole.plan.head_makes_loss


def on_a_rank(sequence_parallel: bool, chunk: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    model = ModelConfig(**LLAMA_LIKE)
    groups = tensor_groups(2)
    built = build(model, Layout(tp=2, sequence_parallel=sequence_parallel), groups, chunk_tokens=chunk)
    sum_partial_gradients(built.layers, groups.tp)
    loss, gradients = loss_and_gradients(built, *inputs_and_targets(model))
    return loss, undivided(built, gradients, groups.tp)


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
def test_a_cut_vocabulary_gives_the_same(ranks: Any, sequence_parallel: bool) -> None:
    wanted_loss, wanted = of_a_model({}, torch.float32)
    for loss, found in ranks.run(on_a_rank, 2, sequence_parallel, 5):
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert_same_tensors(found, wanted, 5e-6)


# ---- memory

WORDS = 131_072


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor with an axis of words, and how many axes of words were ever made with others."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and WORDS in tensor.shape and HIDDEN not in tensor.shape:
                self.numbers = max(self.numbers, tensor.numel())
        return made


HIDDEN, TOKENS, CHUNK = 8, 96, 16


@pytest.mark.parametrize("chunk", [CHUNK, None], ids=["chunked", "whole"])
def test_the_largest_tensor_of_words_is_one_chunks(chunk: int | None) -> None:
    hidden = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    weight = torch.randn(WORDS, HIDDEN, requires_grad=True)
    loss = WeightedLoss(VocabularyShare(WORDS, WORDS, solo_groups().tp))
    targets = (torch.zeros(1, TOKENS, dtype=torch.int64), torch.ones(1, TOKENS))
    with Largest() as largest:
        output = PendingLogits(hidden, weight, HeadProduct(chunk, False)) if chunk else hidden @ weight.t()
        loss(output, targets).backward()
    assert largest.numbers == (chunk or TOKENS) * WORDS


# ---- how large a chunk


def test_auto_chunks_what_is_large_alone() -> None:
    model = get_preset("llama3-8b")
    assert chunk_tokens("auto", model, num_tokens=8192, tp=1) == AUTO_CHUNK_TOKENS
    assert chunk_tokens("auto", model, num_tokens=8192, tp=8) is None
    assert chunk_tokens("all", model, num_tokens=8192, tp=1) is None
    assert chunk_tokens(100, model, num_tokens=8, tp=1) == 100
    assert chunk_tokens("auto", get_preset("electra-base"), num_tokens=10**7, tp=1) is None


def test_chunks_are_nearly_even() -> None:
    assert [tokens_of_a_chunk(wanted, 4100) for wanted in (2048, 4100, 10_000, 1)] == [1367, 4100, 4100, 1]
