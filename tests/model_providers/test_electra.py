"""A generator's guesses stand in the text where it was asked, in its own proportions, and both models learn."""

from typing import Any

import pytest
import torch

from model_providers.config import ModelConfig
from model_providers.electra import Replacement
from model_providers.layer_plan import ElectraInputs
from model_providers.layout import Layout, layout_problems
from tests.model_providers.plans import build, gpt2_like

ELECTRA = {
    "bert": {"token_types": 0, "sentence_head": False},
    "electra": {"generator_layers": 1, "generator_hidden_size": 16, "generator_heads": 2},
}


def model(**facts: Any) -> ModelConfig:
    return gpt2_like(**ELECTRA | facts)


def inputs(rows: int = 3, length: int = 16) -> ElectraInputs:
    generator = torch.Generator().manual_seed(2)
    originals = torch.randint(0, 119, (rows, length), generator=generator)
    asked = (torch.rand(rows, length, generator=generator) < 0.3).int()
    return ElectraInputs(torch.where(asked > 0, 119, originals), originals, asked)


def test_both_learn_and_only_what_was_asked_for_is_replaced() -> None:
    built = build(model())
    value = inputs()
    logits, losses, replaced = built(value)
    assert logits.shape == losses.shape == (16, 3) and replaced.shape == (3, 16)
    assert replaced.any() and not replaced[value.asked == 0].any()
    weights = value.asked / value.asked.sum()
    loss = built.plan.loss((logits, losses, replaced), (value.originals, weights, torch.full((3,), 1 / 3)))
    loss.backward()
    for name, parameter in built.named_parameters().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    told = torch.nn.functional.binary_cross_entropy_with_logits(logits, replaced.t().float())
    wanted = losses.t()[value.asked > 0].mean() + 50.0 * told
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_guesses_have_the_generators_proportions() -> None:
    layer = build(model()).layers["replacement"]
    assert isinstance(layer, Replacement)
    rows, length = 400, 25
    chances = torch.zeros(128)
    chances[:3] = torch.tensor([0.5, 0.3, 0.2])
    logits = chances.clamp_min(1e-30).log().expand(length, rows, 128)
    originals = torch.arange(rows * length).reshape(rows, length)
    guesses = layer._guesses(logits, originals)
    shares = torch.bincount(guesses.flatten(), minlength=128) / guesses.numel()
    assert torch.allclose(shares[:3], chances[:3], atol=0.02) and shares[3:].sum() == 0
    assert torch.equal(layer._guesses(logits[:, :7], originals[:7]), guesses[:7]), (
        "a sample's own, whatever its batch"
    )


def test_an_electra_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"electra: needs bert\.sentence_head=False"):
        model(bert={})
    with pytest.raises(ValueError, match=r"electra\.generator_heads=3: must divide"):
        model(electra={"generator_layers": 1, "generator_hidden_size": 16, "generator_heads": 3})
    with pytest.raises(ValueError, match="tie_embeddings=False with electra"):
        model(tie_embeddings=False)


def test_a_generator_must_be_cut_too() -> None:
    problems = layout_problems(model(), Layout(tp=4), 16)
    assert (
        len(problems) == 1 and "layout.tp=4: does not divide model.electra.generator_heads=2" in problems[0]
    )
    assert not layout_problems(model(), Layout(tp=2), 16)
