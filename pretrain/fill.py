"""`megaloom fill CHECKPOINT --text "a [MASK] story"`: what an encoder, or a T5, puts in place of what is masked."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from data_tools.special_tokens import NUM_SENTINELS, SpecialTokens, special_tokens
from model_providers.layer_plan import BERTInputs, T5Inputs
from pretrain.errors import RunError
from pretrain.generate import WAYS, Trained, load_trained

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
    trained = load_trained(words.checkpoint, device)
    if trained.config.model.family == "gpt":
        raise RunError(f"checkpoint={words.checkpoint}: {WAYS['gpt']}")
    if trained.config.model.electra is not None:
        raise RunError(
            f"checkpoint={words.checkpoint}: an ELECTRA, which tells replaced tokens and fills in nothing"
        )
    for text in words.text:
        if trained.config.model.family == "t5":
            print(fill_spans(trained, text, most=words.tokens))
            continue
        found = fill_text(trained, text, top=words.top)
        print(found.text)
        for guesses in found.guesses:
            print("    " + ", ".join(f"{guess.text!r} {guess.probability:.2%}" for guess in guesses))


@torch.no_grad()
def fill_text(trained: Trained, text: str, *, top: int) -> Filled:
    """Every mask at once, each for itself, as the model was trained."""
    special = special_tokens(trained.tokenizer, trained.config.data.objective)
    ids, masks = _encoded(trained, special, text)
    value = BERTInputs(torch.tensor([ids], device=trained.device))
    for layer in trained.layers:
        value = layer(value)
    logits = value if isinstance(value, torch.Tensor) else value[0]  # [s 1 v]
    if top > special.text_size:
        raise RunError(f"--top={top}: the vocabulary has {special.text_size} tokens; give at most as many")
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


@torch.no_grad()
def fill_spans(trained: Trained, text: str, *, most: int) -> str:
    """The text with each mask replaced by the span that the decoder says for it, greedily; and the spans alone."""
    special = special_tokens(trained.tokenizer, trained.config.data.objective)
    parts, end = text.split(MASK), trained.tokenizer.end_of_document
    if not 2 <= len(parts) <= NUM_SENTINELS + 1:
        raise RunError(
            f"--text={text!r}: {len(parts) - 1} masks, and there may be 1 to {NUM_SENTINELS}; write {MASK} for each"
        )
    ids = [special["mode-R"]] if "mode-R" in special.ids else []
    for number, part in enumerate(parts):
        ids += [special[f"sentinel-{number - 1}"]] if number else []
        ids += [int(token) for token in trained.tokenizer.encode_batch([part])[0]]
    limit = trained.config.data.sequence_length
    if len(ids) >= limit:
        raise RunError(
            f"--text: {len(ids)} tokens, and the model was trained on data.sequence_length={limit}; shorten it"
        )
    said = _said(trained, [*ids, end], begin=special["padding"], end=end, most=most)
    sentinels = {special[f"sentinel-{number}"]: number for number in range(NUM_SENTINELS)}
    spans: list[list[int]] = [[] for _ in parts]
    number = len(parts) - 1  # what is said before any sentinel belongs nowhere
    for token in said:
        if token in sentinels:
            number = min(sentinels[token], len(parts) - 1)
        else:
            spans[number].append(token)
    answers = [trained.tokenizer.decode([t for t in span if t < special.text_size]) for span in spans]
    filled = "".join(f"{answer}{part}" for answer, part in zip(answers[:-1], parts[1:], strict=True))
    return "\n".join([parts[0] + filled, "    " + ", ".join(repr(answer) for answer in answers[:-1])])


def _said(trained: Trained, ids: list[int], *, begin: int, end: int, most: int) -> list[int]:
    """What the decoder says of the encoder's tokens; the encoder runs once."""
    names = [layer.name for layer in trained.plan.layers]
    cut = names.index("decoder_embedding")
    said = [begin]
    value = T5Inputs(torch.tensor([ids], device=trained.device), torch.tensor([said], device=trained.device))
    memory: Any = value
    for layer in trained.layers[:cut]:
        memory = layer(memory)
    for _ in range(most):
        step = memory._replace(targets=torch.tensor([said], device=trained.device))
        for layer in trained.layers[cut:]:
            step = layer(step)
        token = int(step[-1, 0, : trained.config.model.known_vocab_size].argmax())
        if token == end:
            break
        said.append(token)
    return said[1:]
