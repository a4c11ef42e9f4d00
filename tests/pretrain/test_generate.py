"""Sampling from logits, and what `megaloom generate` refuses."""

import torch

from pretrain.generate import Sampling, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def drawn(sampling: Sampling, times: int = 400) -> set[int]:
    random = torch.Generator().manual_seed(0)
    return {choose(LOGITS.clone(), sampling, random) for _ in range(times)}


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(Sampling(temperature=0), 3) == {0}


def test_all_tokens_are_possible_without_limits() -> None:
    assert drawn(Sampling(temperature=1.0)) == {0, 1, 2, 3}


def test_top_k_keeps_k_tokens() -> None:
    assert drawn(Sampling(temperature=1.0, top_k=2)) == {0, 1}
    assert drawn(Sampling(temperature=1.0, top_k=9)) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    """Probabilities are 0.64, 0.24, 0.09, 0.03."""
    assert drawn(Sampling(temperature=1.0, top_p=0.5)) == {0}
    assert drawn(Sampling(temperature=1.0, top_p=0.7)) == {0, 1}
    assert drawn(Sampling(temperature=1.0, top_p=0.9)) == {0, 1, 2}


def test_probabilities_are_those_of_the_softmax() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose(LOGITS.clone(), Sampling(temperature=0.5), random)] += 1
    assert torch.allclose(counts / 4000, (LOGITS / 0.5).softmax(-1), atol=0.02)
