"""Checkpoints without tensors: state, run file, tokenizer and manifest, for what is judged before any rank starts."""

from pathlib import Path

from data_tools.training_data import check_data
from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.state import make_state
from pretrain.config_io import Run
from pretrain.run_file import to_yaml


def write_checkpoint(run: Run, step: int) -> Path:
    """As if ``run`` had saved itself after ``step`` steps."""
    data = check_data(run.config.data)
    state = make_state(
        run,
        data,
        step=step,
        consumed_samples=step * run.global_size,
        consumed_tokens=step * run.tokens_per_step,
    )
    folder = store.partial_folder(run.checkpoints, step)
    (folder / store.STATE).write_text(state.to_json(), "utf-8")
    (folder / store.CONFIG).write_text(to_yaml(run.config), "utf-8")
    data.tokenizer.save(folder / store.TOKENIZER)
    for name in (store.WEIGHTS, store.ENGINE):
        (folder / name).mkdir()
        (folder / name / "tensors").write_bytes(b"\0" * 100)
    return seal(folder)


def seal(folder: Path) -> Path:
    """Write the manifest of what is there now, and give the folder its name."""
    return store.complete(folder, [manifest.record(folder, path) for path in manifest.files_of(folder)])
