"""What `megaloom prepare` and `megaloom data merge` say when they are done."""

from data_tools.documents import Skips
from data_tools.manifest import Manifest

# With fewer, the default split (98,2,0, by documents) leaves one or none to validate on.
FEW_DOCUMENTS = 100
NAME_WIDTH = 12


def print_summary(
    prefix: str, manifest: Manifest, skips: Skips, *, was_there: bool, elapsed_s: float | None
) -> None:
    """Counts, what was left out and why, where the files are, and the command that comes next; on stdout."""
    if was_there:
        print(f"already prepared: {prefix} holds exactly this corpus, nothing was done")
    for name, value in _rows(prefix, manifest, elapsed_s=None if was_there else elapsed_s):
        print(f"{name:<{NAME_WIDTH}}{value}")
    for reason, example in skips.examples.items():
        print(f"left out {skips.counts[reason]:,} as {reason!r}, first {example}")
    if manifest.documents < FEW_DOCUMENTS:
        print(_few(manifest))
    print(f"{'next':<{NAME_WIDTH}}megaloom data inspect {prefix}")


def _rows(prefix: str, manifest: Manifest, *, elapsed_s: float | None) -> list[tuple[str, str]]:
    text, tokens = manifest.text_bytes, manifest.tokens
    skipped = sum(manifest.skipped.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    rows = [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{tokens:,} ({manifest.dtype}, {text / max(1, tokens):.2f} bytes of text per token)"),
        ("text", f"{text:,} bytes"),
        ("left out", f"{skipped:,} records" + (f" ({reasons})" if reasons else "")),
        ("tokenizer", f"{manifest.tokenizer.spec} ({manifest.tokenizer.vocab_size:,} ids)"),
        ("files", f"{prefix}.bin  .idx  .json  .tokenizer/"),
    ]
    if elapsed_s is not None:
        rows.insert(3, ("time", f"{elapsed_s:.1f} s, {text / 1e6 / max(1e-9, elapsed_s):.1f} MB/s"))
    return rows


def _few(manifest: Manifest) -> str:
    plural = "s" if manifest.documents > 1 else ""
    return (
        f"note: {manifest.documents} document{plural}: the train/valid/test split goes by documents, so name "
        f"a validation corpus, or cut .txt files with --txt-documents paragraph (or line)"
    )
