"""`megaloom fill CHECKPOINT --text "a [MASK] story"`: what an encoder puts in place of masked words."""

import argparse
from dataclasses import dataclass

import torch

from data_tools.special_tokens import SpecialTokens, special_tokens
from model_providers.layer_plan import BERTInputs
from pretrain.errors import RunError
from pretrain.generate import Trained, load_trained

MASK = "[MASK]"


@dataclass(frozen=True)
class Guess:
    text: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """A text, the likeliest one in its place, and the guesses at each masked token."""

    text: str
    guesses: list[list[Guess]]


def fill(words: argparse.Namespace) -> None:
    """Print what ``megaloom fill`` was asked for (`launch.fill` has the words)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(words.checkpoint, device, family="bert")
    for text in words.text:
        found = fill_text(trained, text, top=words.top)
        print(found.text)
        for guesses in found.guesses:
            print("    " + ", ".join(f"{guess.text!r} {guess.probability:.0%}" for guess in guesses))


@torch.no_grad()
def fill_text(trained: Trained, text: str, *, top: int) -> Filled:
    """Every mask at once, each for itself, as the model was trained."""
    special = special_tokens(trained.tokenizer, trained.config.data.objective)
    ids, masks = _encoded(trained, special, text)
    value = BERTInputs(torch.tensor([ids], device=trained.device))
    for layer in trained.layers:
        value = layer(value)
    logits = value if isinstance(value, torch.Tensor) else value[0]  # [s 1 v]
    chances = logits[masks, 0, : special.text_size].float().softmax(dim=-1)  # [masks v]
    best = chances.topk(top)
    guesses = [
        [
            Guess(trained.tokenizer.decode([int(token)]), float(chance))
            for token, chance in zip(tokens, some, strict=True)
        ]
        for tokens, some in zip(best.indices, best.values, strict=True)
    ]
    for place, tokens in zip(masks, best.indices, strict=True):
        ids[place] = int(tokens[0])
    return Filled(trained.tokenizer.decode(ids[1:-1]), guesses)


def _encoded(trained: Trained, special: SpecialTokens, text: str) -> tuple[list[int], list[int]]:
    """Ids with their ends, and the places of the masks."""
    parts = text.split(MASK)
    if len(parts) == 1:
        raise RunError(f"--text={text!r}: nothing to fill in; write {MASK} where a token is missing")
    ids = [special["begin"]]
    masks = []
    for number, part in enumerate(parts):
        if number:
            masks.append(len(ids))
            ids.append(special["mask"])
        ids += [int(token) for token in trained.tokenizer.encode_batch([part])[0]]
    ids.append(special["separator"])
    limit = trained.config.model.max_sequence_length
    if trained.config.model.position_embedding == "learned" and len(ids) > limit:
        raise RunError(f"--text: {len(ids)} tokens, and model.max_sequence_length={limit}; shorten it")
    return ids, masks
