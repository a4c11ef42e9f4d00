"""How large a model a number of tokens deserves, at which learning rate and batch: published laws, evaluated.

Laws hold where they were fitted: dense decoders of 40M to 16B parameters for the first two, to 1B (and 100B tokens) for
the third.  Beyond that they are extrapolations, and `Advice.cautions` says so.
"""

from dataclasses import dataclass

from model_providers.config import ModelConfig
from model_providers.cost import active_parameters, word_parameters
from model_providers.presets import PRESETS
from pretrain.errors import RunError

LARGEST_FITTED_PARAMETERS = 16e9  # Hoffmann et al. 2022, section 3.3
FEWEST_TOKENS, MOST_TOKENS = 1e6, 1e16
TOO_SMALL_TO_PROPOSE = 50e6  # parameters; presets for tests and demos


@dataclass(frozen=True)
class LossFit:
    """L(N, D) = E + A / N^alpha + B / D^beta: parameters N, tokens D."""

    name: str
    a: float
    b: float
    e: float
    alpha: float
    beta: float

    def loss(self, num_parameters: float, num_tokens: float) -> float:
        return self.e + self.a / num_parameters**self.alpha + self.b / num_tokens**self.beta

    def parameters_for(self, num_tokens: float) -> float:
        """Of the model for whose optimum under C = 6 N D these tokens are right: both terms' slopes in log C agree."""
        return (self.alpha * self.a * num_tokens**self.beta / (self.beta * self.b)) ** (1 / self.alpha)

    def tokens_for(self, num_parameters: float) -> float:
        return (self.beta * self.b * num_parameters**self.alpha / (self.alpha * self.a)) ** (1 / self.beta)


# Hoffmann et al. 2022 (arXiv:2203.15556), approach 3: equation 10 in appendix D.3.
HOFFMANN = LossFit("Hoffmann et al. 2022, approach 3", 406.4, 410.7, 1.69, 0.34, 0.28)
# Besiroglu et al. 2024 (arXiv:2404.10102): the same law, fitted again to the same runs; agrees with approaches 1 and 2.
BESIROGLU = LossFit("Besiroglu et al. 2024", 482.01, 2085.43, 1.8172, 0.3478, 0.3658)


def step_law_lr(num_parameters: float, num_tokens: float) -> float:
    """Peak of AdamW (Li et al. 2025, arXiv:2503.04715); parameters without embeddings."""
    return 1.79 * num_parameters**-0.713 * num_tokens**0.307


def step_law_batch_tokens(num_tokens: float) -> float:
    """Tokens of an optimizer step (Li et al. 2025, arXiv:2503.04715)."""
    return 0.58 * num_tokens**0.571


@dataclass(frozen=True)
class Advice:
    """What the laws say for so many tokens, and for one model if it is known."""

    num_tokens: float
    optimal_parameters: dict[str, float]  # by law
    nearest_preset: str
    lr: float
    batch_tokens: float
    loss: float  # Besiroglu et al.'s, of MassiveText with their tokenizer: good for comparing, not for predicting
    cautions: tuple[str, ...]


def advise(num_tokens: float, model: ModelConfig | None = None) -> Advice:
    """Raises `RunError` if the number of tokens is none that a law knows of."""
    check_tokens(num_tokens)
    optimal = {fit.name: fit.parameters_for(num_tokens) for fit in (BESIROGLU, HOFFMANN)}
    nearest = nearest_preset(optimal[BESIROGLU.name])
    chosen = PRESETS[nearest] if model is None else model
    size, inner = active_parameters(chosen), inner_parameters(chosen)
    cautions = []
    if max(size, optimal[BESIROGLU.name]) > LARGEST_FITTED_PARAMETERS:
        cautions.append("the loss laws were fitted on models up to 16B parameters; this extrapolates")
    if size > 1.1e9 or num_tokens > 1.1e11:
        cautions.append(
            "Step Law was fitted up to 1B parameters and 100B tokens; try a smaller learning rate beside it"
        )
    if model is not None and num_tokens < BESIROGLU.tokens_for(size) / 2:
        cautions.append(
            f"{num_tokens:.3g} tokens are less than half of what is compute-optimal for {size:.3g} parameters "
            f"({BESIROGLU.tokens_for(size):.3g})"
        )
    return Advice(
        num_tokens,
        optimal,
        nearest,
        step_law_lr(inner, num_tokens),
        step_law_batch_tokens(num_tokens),
        BESIROGLU.loss(size, num_tokens),
        tuple(cautions),
    )


def check_tokens(num_tokens: float) -> None:
    if not FEWEST_TOKENS <= num_tokens <= MOST_TOKENS:
        raise RunError(
            f"--tokens={num_tokens:g}: laws of training know {FEWEST_TOKENS:g} to {MOST_TOKENS:g}; give such as 300e9"
        )


def inner_parameters(model: ModelConfig) -> int:
    """Those that a token meets, without embedding and head."""
    return active_parameters(model) - word_parameters(model) * (1 if model.tie_embeddings else 2)


def nearest_preset(num_parameters: float) -> str:
    """Of the dense decoders, by ratio; among equals the newest, which stands last."""
    sizes = {
        name: active_parameters(model)
        for name, model in PRESETS.items()
        if model.family == "gpt" and model.moe is None and model.vocab_size is not None
    }
    sizes = {name: size for name, size in sizes.items() if size > TOO_SMALL_TO_PROPOSE}
    return min(
        reversed(sizes), key=lambda name: max(sizes[name] / num_parameters, num_parameters / sizes[name])
    )
