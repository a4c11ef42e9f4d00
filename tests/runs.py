"""Small runs for tests: a corpus of made-up sentences, a tiny model, and any value overridden by dotted key."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

from data_tools.prepare import Recipe, prepare
from pretrain.config_io import Run, make_run
from pretrain.nested import put

TEXT = "the a loom weaves wide threads of many small ranks into one even cloth while gradients wander home"
WORDS = TEXT.split()


def write_text(path: Path, *, num_documents: int, seed: int) -> Path:
    """JSON lines of documents with 5 to 60 words each."""
    chance = random.Random(seed)
    lines = []
    for _ in range(num_documents):
        text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(5, 60)))
        lines.append(f'{{"text": "{text}"}}\n')
    path.write_text("".join(lines), "utf-8")
    return path


def make_corpus(folder: Path, *, name: str = "corpus", num_documents: int = 120, seed: int = 7) -> str:
    """A corpus of bytes; returns its prefix."""
    text = write_text(folder / f"{name}.jsonl", num_documents=num_documents, seed=seed)
    prefix = str(folder / name)
    prepare(Recipe((str(text),), "bytes"), prefix, num_workers=1)
    return prefix


def tiny(corpus: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A run file's contents; ``changes`` are dotted keys with ``__`` for the dots."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "model": {
            "preset": "tiny",
            "num_layers": 4,
            "vocab_size": 257,
            "init_std": 0.1,
            "qk_norm": True,
        },
        "data": {"train": corpus, "split": "90,10,0", "sequence_length": 32},
        "train": {"steps": 20, "eval_samples": 10},
        "batch": {"global_size": 8, "micro_size": 2},
        "optimizer": {"lr": 1e-3, "gradient_clipping": 0.5},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "deepspeed": "zero1.json",
        "monitor": {"tensorboard": False},
        "kernels": "torch",
    }
    for key, value in changes.items():
        put(raw, key.replace("__", "."), deepcopy(value))  # later keys are put into it
    return raw


def checked(raw: dict[str, Any], world_size: int) -> Run:
    return make_run(raw, world_size=world_size)
