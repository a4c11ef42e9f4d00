"""Packed documents do not see each other, windows end where they say, and positions restart."""

from typing import Any

import pytest
import torch

from model_providers.layer_plan import GPTInputs, Targets
from model_providers.masks import MaskMaker, positions, visible
from model_providers.portable import attend
from tests.model_providers.plans import batch, build, gpt2_like, llama_like, loss_and_gradients

SEGMENTS = torch.tensor([[0] * 6 + [1] * 10, [0] * 11 + [1] * 5], dtype=torch.int32)


@pytest.mark.parametrize(
    "model", [llama_like(), gpt2_like(), llama_like(sliding_window=4)], ids=["llama", "gpt2", "window"]
)
def test_packed_documents_equal_separate_ones(model: Any) -> None:
    built = build(model)
    tokens, targets = batch(model)
    packed, packed_gradients = loss_and_gradients(built, GPTInputs(tokens, SEGMENTS), targets)
    total, summed = 0.0, {name: torch.zeros_like(g) for name, g in packed_gradients.items()}
    for row, split in ((0, 6), (1, 11)):
        for part in (slice(0, split), slice(split, 16)):
            own = Targets(targets.labels[row : row + 1, part], targets.weights[row : row + 1, part])
            loss, gradients = loss_and_gradients(built, tokens[row : row + 1, part], own)
            total += loss
            summed = {name: summed[name] + gradient for name, gradient in gradients.items()}
    assert packed == pytest.approx(total, rel=1e-5)
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(
            gradient, summed[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_without_segments_documents_do_see_each_other() -> None:
    built = build(llama_like())
    tokens, _ = batch(llama_like())
    assert not torch.allclose(built(tokens), built(GPTInputs(tokens, SEGMENTS)), atol=1e-3)


def test_positions_restart_at_each_document() -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    assert positions(tokens, None, start=3).tolist() == [list(range(3, 19))]
    assert positions(tokens, SEGMENTS).tolist() == [[*range(6), *range(10)], [*range(11), *range(5)]]


def test_the_mask_of_the_same_segments_is_made_once() -> None:
    masks = MaskMaker()
    first = masks.hidden(SEGMENTS)
    assert first is not None and first.shape == (2, 1, 16, 16)
    assert masks.hidden(SEGMENTS) is first
    assert masks.hidden(SEGMENTS.clone()) is not first
    assert masks.hidden(None) is None


@pytest.mark.parametrize("window", [1, 3, 16, 40])
def test_a_sliding_window_equals_an_explicit_mask(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(16, 2, 4, 8, generator=generator) for _ in range(3))

    class Config:
        window_size = (window - 1, 0)
        attention_dropout = 0.0
        softmax_scale = None
        sequence_parallel = False

    found = attend(query, key, value, None, Config, is_causal=True, training=True)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / 8**0.5
    distance = torch.arange(16)[:, None] - torch.arange(16)[None]
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    wanted = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).flatten(2)
    torch.testing.assert_close(found, wanted)


def test_plain_causal_attention_and_single_queries_need_no_mask() -> None:
    cpu = torch.device("cpu")
    assert visible(8, 8, None, None, cpu) is None
    assert visible(1, 8, None, None, cpu) is None
    assert visible(8, 8, 8, None, cpu) is None
    late = visible(2, 5, None, None, cpu)
    assert late is not None and late.tolist() == [[True] * 4 + [False], [True] * 5]


def test_a_prefix_is_seen_both_ways_and_nothing_else_ahead() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.int32)
    hidden = MaskMaker(has_prefix=True).hidden(segments)
    assert hidden is not None
    for row, length in enumerate((3, 1)):
        for query in range(5):
            for key in range(5):
                assert bool(~hidden[row, 0, query, key]) == (key <= query or key < length)


def test_a_prefix_changes_what_comes_before() -> None:
    """In a causal model it does not: the first token's output is its own affair."""
    model = llama_like(attention="prefix")
    built = build(model)
    tokens, _ = batch(model)
    segments = torch.ones_like(tokens, dtype=torch.int32)
    with torch.no_grad():
        causal = built(GPTInputs(tokens, segments))
        plain = build(llama_like())(tokens)
        segments[:, :6] = 0
        seen = built(GPTInputs(tokens, segments))
    torch.testing.assert_close(causal, plain)
    assert not torch.allclose(seen[0], plain[0]) and seen.shape == plain.shape
