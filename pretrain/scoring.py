"""`megaloom evaluate CHECKPOINT`: how well a trained model does on held-out text, in one process."""

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_tools.corpus import Corpus
from data_tools.loader import Batch, SampleSource, StepShape
from data_tools.masked_batches import MaskedBatch
from data_tools.training_data import open_data
from pretrain.batches import inputs_of
from pretrain.checkpoint.store import TOKENIZER
from pretrain.errors import RunError
from pretrain.generate import Trained, load_trained


@dataclass(frozen=True)
class Score:
    """Of one set."""

    samples: int
    tokens: int  # that the model had to say
    loss: float  # nats per token
    bits_per_byte: float | None  # None: nothing is spelled
    accuracy: float  # of the likeliest token
    sentence_accuracy: float | None = None  # of a second task

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def told(self) -> dict[str, float | int]:
        facts: dict[str, float | int] = {
            "samples": self.samples,
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
        }
        if self.bits_per_byte is not None:
            facts["bits_per_byte"] = self.bits_per_byte
        if self.sentence_accuracy is not None:
            facts["sentence_accuracy"] = self.sentence_accuracy
        return facts


def evaluate(words: argparse.Namespace) -> None:
    """Print what ``megaloom evaluate`` was asked for (`launch.evaluate` has the words)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(words.checkpoint, device)
    sets = held_out_sets(trained, words.data)
    wanted = words.set or list(sets)
    unknown = [name for name in wanted if name not in sets]
    if unknown:
        raise RunError(f"--set={unknown[0]}: unknown; the run has {', '.join(sets) or 'none'}")
    scores = {
        name: score(trained, sets[name], num_samples=words.samples, micro_size=words.micro_size)
        for name in wanted
    }
    if words.json:
        print(json.dumps({name: found.told() for name, found in scores.items()}))
        return
    for name, found in scores.items():
        print(name)
        for key, value in found.told().items():
            print(f"  {key:<18} {value:,}" if isinstance(value, int) else f"  {key:<18} {value:.4f}")


def held_out_sets(trained: Trained, corpus: str | None) -> dict[str, SampleSource]:
    """The run's own validation and test sets, or a corpus that the user names."""
    config = trained.config.data
    changes: dict[str, Any] = {
        "verify": "off" if config.verify == "off" else "sampled"
    }  # an evaluation does not wait for all of it
    if corpus is not None:
        changes |= {"train": corpus, "split": "100,0,0", "validation": {corpus: corpus}, "test": {}}
    for prefix in [corpus] if corpus is not None else config.prefixes():
        _refuse_other_tokenizer(prefix, trained, key="corpus" if corpus is None else "--data")
    # For corpora that do not say which one made them: their ids are compared with its vocabulary.
    changes["tokenizer"] = str(trained.folder / TOKENIZER)
    data = open_data(type(config)(**{**config.model_dump(), **changes}))
    if corpus is not None:
        return data.validation
    found = {**data.validation, **data.test}
    if not found:
        raise RunError("the run held nothing out (data.split, data.validation); name a corpus: --data PREFIX")
    return found


def _refuse_other_tokenizer(prefix: str, trained: Trained, *, key: str) -> None:
    corpus = Corpus(prefix, check=False)
    if corpus.manifest is None:
        return
    made_by = corpus.manifest.tokenizer
    if made_by.fingerprint != trained.tokenizer.fingerprint:
        raise RunError(
            f"{key}={prefix}: prepared with tokenizer {made_by.spec} ({made_by.vocab_size:,} ids), and the checkpoint "
            f"has another ({trained.tokenizer.vocab_size:,} ids), so its losses would mean nothing: prepare the text "
            f"with --tokenizer {trained.folder / TOKENIZER}"
        )


@torch.no_grad()
def score(trained: Trained, source: SampleSource, *, num_samples: int, micro_size: int) -> Score:
    """Over the first ``num_samples`` samples of a set, or as many as there are."""
    there = min(num_samples, source.dataset.num_distinct_samples())
    size = min(micro_size, there)
    loader = source.evaluation(StepShape(size), num_samples=there)
    totals = np.zeros(4)  # nats, tokens, right ones, bytes
    bytes_of = trained.tokenizer.token_bytes()  # [v]
    sentences = np.zeros(2)  # right ones, all
    for (batch,) in loader:
        output, logits = _outputs(trained, batch)
        mask = _asked(batch)
        if trained.config.model.electra is not None:
            totals += _told(output, batch)
            continue
        losses = trained.plan.loss.token_losses(logits, torch.from_numpy(batch.labels).to(trained.device))  # type: ignore[attr-defined]
        found = logits[..., : trained.config.model.known_vocab_size].argmax(dim=-1).t().cpu().numpy()  # [b s]
        totals += (
            float((losses.t().cpu().numpy() * mask).sum(dtype=np.float64)),
            int(mask.sum()),
            int(((found == batch.labels) & mask).sum()),
            _num_bytes(batch.labels[mask], bytes_of),
        )
        if isinstance(batch, MaskedBatch) and batch.sentence_labels is not None and batch.counts is not None:
            guesses = output[1].argmax(dim=-1).cpu().numpy()
            sentences += (((guesses == batch.sentence_labels) & batch.counts).sum(), batch.counts.sum())
    nats, tokens, right, num_bytes = totals
    return Score(
        samples=there,
        tokens=int(tokens),
        loss=nats / max(1.0, tokens),
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        accuracy=right / max(1.0, tokens),
        sentence_accuracy=sentences[0] / sentences[1] if sentences[1] else None,
    )


def _told(output: Any, batch: Batch) -> np.ndarray:
    """Of an ELECTRA: nats, tokens, and those of which it was told rightly whether they were replaced."""
    logits, _, replaced = output
    there = replaced.t()  # [s b]
    losses = F.binary_cross_entropy_with_logits(logits.float(), there.float(), reduction="none")
    counts = (
        np.ones(there.size(1)) if not isinstance(batch, MaskedBatch) or batch.counts is None else batch.counts
    )
    rows = torch.from_numpy(counts).to(losses.device)
    right = ((logits > 0) == there) * rows
    length = there.size(0)
    return np.array([float((losses * rows).sum()), length * float(rows.sum()), float(right.sum()), 0.0])


def _outputs(trained: Trained, batch: Batch) -> tuple[Any, torch.Tensor]:
    """What the last layer gives, and of it the logits [s b v]."""
    value: Any = inputs_of(batch, trained.device)
    for layer in trained.layers:
        value = layer(value)
    return value, value if isinstance(value, torch.Tensor) else value[0]


def _asked(batch: Batch) -> np.ndarray:
    return np.ones(batch.labels.shape, dtype=np.bool_) if batch.loss_mask is None else batch.loss_mask


def _num_bytes(tokens: np.ndarray, bytes_of: np.ndarray) -> int:
    """Of the text that these tokens stand for; those that an objective appended to the vocabulary stand for none."""
    return int(bytes_of[tokens[tokens < len(bytes_of)]].sum())
