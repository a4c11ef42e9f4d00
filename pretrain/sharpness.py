"""How sharp the loss is in the space of logits.

Keskar et al. 2017 (arXiv:1609.04836, section 2.2.2) look for the largest loss f in a box of half-width
epsilon x (|y_i| + 1) around a point y, and tell 100 x (largest - f) / (1 + f).  They take weights for y.  "To FP8 and
Back Again" (Lee et al. 2024, arXiv:2405.18710) measures in the space of logits instead; of that paper its abstract and
summaries were at hand, so the epsilon and the mean over all tokens are ours.  No search is needed there: a token's
cross-entropy falls with its label's logit and rises with every other, so the largest loss lies in one known corner.
"""

import torch

EPSILON = 1e-3  # the larger of Keskar's two


def worst_losses(logits: torch.Tensor, labels: torch.Tensor, *, epsilon: float = EPSILON) -> torch.Tensor:
    """[s b v] without padding, [s b] -> [s b]: each token's largest cross-entropy in its box."""
    y = logits.detach().float()
    reach = epsilon * (y.abs() + 1)
    index = labels.unsqueeze(-1)  # [s b 1]
    worst = (y + reach).scatter(-1, index, (y - reach).gather(-1, index))
    return torch.logsumexp(worst, dim=-1) - worst.gather(-1, index).squeeze(-1)


def sharpness(loss: float, largest: float) -> float:
    """Per cent."""
    return 100 * (largest - loss) / (1 + loss)
