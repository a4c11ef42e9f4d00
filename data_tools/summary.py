"""What `megaloom prepare` and `megaloom data merge` say when they are done."""

from data_tools.documents import Skips
from data_tools.manifest import Manifest

# With fewer, the default split (98,2,0, by documents) leaves one or none to validate on.
FEW_DOCUMENTS = 100
NAME_WIDTH = 12


def print_summary(
    prefix: str, manifest: Manifest, skips: Skips, *, was_there: bool, elapsed_s: float
) -> None:
    """Counts, what was left out and why, where the files are, and the command that comes next; on stdout."""
    if was_there:
        print(f"already prepared: {prefix} holds exactly this corpus, nothing was done")
    rows = _counts(manifest)
    if not was_there:
        rate = manifest.text_bytes / 1e6 / max(1e-9, elapsed_s)
        rows.append(("time", f"{elapsed_s:.1f} s, {rate:.1f} MB/s"))
    rows += [("left out", _left_out(manifest)), *(("", account) for account in skips.accounts())]
    rows += [
        ("files", f"{prefix}.bin  .idx  .json  .tokenizer/"),
        ("next", f"megaloom data inspect {prefix}"),
    ]
    for name, value in rows:
        print(f"{name:<{NAME_WIDTH}}{value}")
    if manifest.documents < FEW_DOCUMENTS:
        print(_few(manifest))


def _counts(manifest: Manifest) -> list[tuple[str, str]]:
    text, tokens = manifest.text_bytes, manifest.tokens
    return [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{tokens:,} ({manifest.dtype}, {text / max(1, tokens):.2f} bytes of text per token)"),
        ("text", f"{text:,} bytes"),
        ("tokenizer", f"{manifest.tokenizer.spec} ({manifest.tokenizer.vocab_size:,} ids)"),
    ]


def _left_out(manifest: Manifest) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    count = sum(manifest.skipped.values())
    return f"{count:,} record{'' if count == 1 else 's'}" + (f" ({reasons})" if reasons else "")


def _few(manifest: Manifest) -> str:
    plural = "s" if manifest.documents > 1 else ""
    return (
        f"note: {manifest.documents} document{plural}: the train/valid/test split goes by documents, so name "
        f"a validation corpus, or cut .txt files with --txt-documents paragraph (or line)"
    )
