"""`megaloom generate CHECKPOINT --prompt ...`: continue a text with a trained model.

One process, whatever layout wrote the checkpoint; keys and values of earlier tokens are cached.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_tools.tokenizer import Tokenizer, load_tokenizer
from model_providers.building import solo_groups
from model_providers.config import ModelConfig
from model_providers.families import build_plan
from model_providers.fp8.config import Fp8Config
from model_providers.generation import generation_cache, next_logits
from model_providers.layer_plan import LayerPlan
from model_providers.layout import Layout, TensorPlace
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.store import CONFIG, TOKENIZER, WEIGHTS
from pretrain.checkpoint.weights import WeightLoader
from pretrain.config import RunConfig
from pretrain.engine.layers import build_layers, tied_names
from pretrain.errors import RunError
from pretrain.run_file import read_yaml

WAYS = {
    "gpt": "a GPT, which continues texts: megaloom generate",
    "bert": "a BERT, which fills in masked words: megaloom fill",
    "t5": "a T5, which fills in masked words: megaloom fill",
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generator:
    """A model and its tokenizer, ready to speak."""

    layers: list[nn.Module]
    model: ModelConfig
    tokenizer: Tokenizer
    device: torch.device

    def continue_text(self, prompt: str, *, num_tokens: int, sampling: Sampling) -> str:
        """``prompt`` and up to ``num_tokens`` tokens more; ends early at the end-of-document token."""
        ids = self.tokenizer.encode_batch([prompt])[0]
        prompt_ids = [int(i) for i in ids] or [self.tokenizer.end_of_document]
        self._check_length(len(prompt_ids) + num_tokens)
        cache = generation_cache(self.model, batch_size=1, max_length=len(prompt_ids) + num_tokens)
        random = torch.Generator(self.device).manual_seed(sampling.seed)
        new: list[int] = []
        step = torch.tensor([prompt_ids], device=self.device)
        for _ in range(num_tokens):
            logits = next_logits(self.layers, step, cache, self.model)[0, -1].float()
            token = choose(logits, sampling, random)
            if token == self.tokenizer.end_of_document:
                break
            new.append(token)
            step = torch.tensor([[token]], device=self.device)
        return prompt + self.tokenizer.decode(new)

    def _check_length(self, length: int) -> None:
        limit = self.model.max_sequence_length
        if self.model.position_embedding == "learned" and length > limit:
            raise RunError(
                f"prompt and --tokens: {length} tokens together, but the learned positions end at "
                f"model.max_sequence_length={limit}; shorten either"
            )


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """The next token from logits [v]: greedy, or drawn after temperature, top-k and top-p, in this order.

    top-p keeps the smallest set of tokens whose probability reaches p (Holtzman et al. 2020, section 3.1).
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        limit = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < limit, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1.0:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # mass of the tokens that rank higher
        probabilities[order[before >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=random))


@dataclass(frozen=True)
class Trained:
    """A model out of a checkpoint, in one process."""

    layers: list[nn.Module]
    config: RunConfig
    tokenizer: Tokenizer
    device: torch.device
    plan: LayerPlan
    folder: Path  # of the checkpoint


def load_trained(
    path: Path,
    device: torch.device,
    *,
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: Fp8Config | None = None,
) -> Trained:
    """From a checkpoint's folder, or the latest of a run's folder; ``family``: the only one that will do.

    ``dtype`` and ``fp8``: number formats of weights and products, whatever those of the run were.
    """
    folder = whole_checkpoint(path)
    config = RunConfig(**read_yaml(folder / CONFIG))
    if family is not None and config.model.family != family:
        raise RunError(f"checkpoint={path}: {WAYS[config.model.family]}")
    layout = Layout(tp=1, pp=1, dp=1)
    plan = build_plan(
        config.model,
        layout,
        solo_groups(),
        seed=0,
        sequence_length=config.data.sequence_length,
        params_dtype=dtype,
        device=device,
        kernels="torch",
        fp8=fp8,
    )
    root = nn.Module()
    loader = WeightLoader(folder / WEIGHTS, TensorPlace(), tied=tied_names(plan))
    layers = [layer.module for layer in build_layers(root, plan.layers, plan.ties, [loader])]
    root.eval()
    return Trained(layers, config, load_tokenizer(str(folder / TOKENIZER)), device, plan, folder)


def load_generator(path: Path, device: torch.device) -> Generator:
    trained = load_trained(path, device, family="gpt")
    return Generator(trained.layers, trained.config.model, trained.tokenizer, device)


def whole_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means; of a run's, the newest whose weights are whole."""
    newest = store.wanted(path, key="checkpoint")
    for folder in [newest] if newest == path else store.checkpoints(newest.parent):
        fault = next(manifest.faults(folder, without=store.ENGINE), None)
        if fault is None:
            return folder
        print(f"{folder} is damaged ({fault}); passed over", file=sys.stderr)
    raise RunError(f"checkpoint={path}: damaged, and there is no whole one beside it; see above")


def speak(words: argparse.Namespace) -> None:
    """Print the continuations that ``megaloom generate`` was asked for (`launch.generate` has the words)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = load_generator(words.checkpoint, device)
    temperature = 0.0 if words.greedy else words.temperature
    for prompt in words.prompt:
        for sample in range(words.samples):
            sampling = Sampling(temperature, words.top_k, words.top_p, words.seed + sample)
            print(generator.continue_text(prompt, num_tokens=words.tokens, sampling=sampling))
