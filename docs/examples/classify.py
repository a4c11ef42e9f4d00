"""Finetune an exported model to tell two kinds of text apart: whole, or with LoRA (pip install peft).

The data is made on the spot from Python's standard library: of a few lines of source, is it asyncio's or tkinter's?

    megaloom export demo/bert --out demo/bert-hf
    python docs/examples/classify.py demo/bert-hf            # all weights
    python docs/examples/classify.py demo/bert-hf --lora     # low-rank updates and the new head alone
"""

import argparse
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

CLASSES = ("asyncio", "tkinter")
LINES, TRAIN, TEST, BATCH = 4, 1200, 300, 16


def examples() -> list[tuple[str, int]]:
    """Snippets with their class, shuffled; imports are left out, which would tell too much."""
    found = []
    for label, package in enumerate(CLASSES):
        lines = [
            line
            for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py"))
            for line in path.read_text("utf-8").splitlines()
            if line.strip() and "import" not in line
        ]
        found += [("\n".join(lines[i : i + LINES]), label) for i in range(0, len(lines) - LINES, LINES)]
    random.Random(0).shuffle(found)
    return found[: TRAIN + TEST]


def accuracy(model: Any, tokenizer: Any, some: list[tuple[str, int]]) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(some), BATCH):
            inputs, labels = batch(tokenizer, some[start : start + BATCH])
            right += int((model(**inputs).logits.argmax(dim=-1) == labels).sum())
    return right / len(some)


def batch(tokenizer: Any, some: list[tuple[str, int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    texts = [text for text, _ in some]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return dict(inputs), torch.tensor([label for _, label in some])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what megaloom export wrote")
    parser.add_argument("--lora", action="store_true", help="train low-rank updates only (needs peft)")
    parser.add_argument("--epochs", type=int, default=3)
    words = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(words.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have none
    model: Any = AutoModelForSequenceClassification.from_pretrained(words.folder, num_labels=len(CLASSES))
    model.config.pad_token_id = tokenizer.pad_token_id
    if words.lora:
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(
            model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules="all-linear")
        )
        model.print_trainable_parameters()
    found = examples()
    train, test = found[:TRAIN], found[TRAIN:]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    print(f"before: {accuracy(model, tokenizer, test):.1%} of {len(test)} right")
    for epoch in range(words.epochs):
        model.train()
        for start in range(0, len(train), BATCH):
            inputs, labels = batch(tokenizer, train[start : start + BATCH])
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: {accuracy(model, tokenizer, test):.1%}")


if __name__ == "__main__":
    main()
