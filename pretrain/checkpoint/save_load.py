"""Save a run and find it again: what every rank does, in which order.

Saving: all ranks write into a partial folder, hash what was written, and the first rank completes it.  Loading:
the newest checkpoint whose files all match its manifest; a damaged one is passed over with a line, so the run
goes on from the last good state instead of failing.
"""

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from pretrain.checkpoint import manifest, store
from pretrain.checkpoint.fit import check_fits
from pretrain.checkpoint.state import RunState, read_state, readable_state
from pretrain.checkpoint.store import CONFIG, ENGINE, STATE, TOKENIZER, WEIGHTS
from pretrain.checkpoint.weights import ExpertRestorer, state_of, write_layer
from pretrain.config_io import Run
from pretrain.disks import no_space, size_told
from pretrain.engine import plain_loads
from pretrain.engine.base import Engine
from pretrain.engine.groups import Groups, wait_for_all
from pretrain.engine.layers import tied_names
from pretrain.errors import RunError
from pretrain.run_file import to_yaml

log = logging.getLogger(__name__)

UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
SPARE_SPACE = 1.1  # a checkpoint needs this times the bytes of the last one to be tried


def save(run: Run, engine: Engine, state: RunState, tokenizer_folder: Path) -> Path | None:
    """Write a checkpoint of this step; every rank calls it.  None if the disk has no room for it."""
    groups, root = engine.groups, run.checkpoints
    final = root / store.folder_name(state.step)
    needed = bytes_together(engine)
    if not _told_by_first(groups, _has_room(root, needed) if groups.is_first else None):
        return None
    folder = root / (final.name + store.PARTIAL)
    with _full_disk_in_words(folder):
        if groups.is_first:
            store.partial_folder(root, state.step)
        wait_for_all()
        engine.save(folder / ENGINE, client_state=UNIVERSAL_INFO)
        write_weights(folder / WEIGHTS, engine)
        if groups.is_first:
            (folder / STATE).write_text(state.to_json(), "utf-8")
            (folder / CONFIG).write_text(to_yaml(run.config), "utf-8")
            shutil.copytree(tokenizer_folder, folder / TOKENIZER)
        wait_for_all()
        records = _hash_together(folder, groups)
        if groups.is_first:
            store.complete(folder, records)
            store.prune(root, run.config.checkpoint.keep_last)
    wait_for_all()
    return final


@contextmanager
def _full_disk_in_words(folder: Path) -> Iterator[None]:
    """A disk that fills up meanwhile: others may have written to it too.

    The rank that meets it ends the run: the others wait for it in the middle of the save, which cannot be undone.
    The half checkpoint goes with the next save, and the ones before stand.
    """
    try:
        yield
    except Exception as fault:
        full = no_space(fault, folder)
        if full is None:
            raise
        raise RunError(f"the checkpoint is NOT saved: {full}. The checkpoints before it stand") from None


def bytes_together(engine: Engine) -> int:
    """What a checkpoint of all ranks will take, from the tensors that are in memory; collective.

    DeepSpeed's files hold each rank's optimizer states and, once a copy of the model, its weights, which stand beside
    them as safetensors again.
    """
    held: dict[int, torch.Tensor] = {}
    optimizer = engine.deepspeed.basic_optimizer
    for group in optimizer.param_groups:
        held |= {id(parameter): parameter for parameter in group["params"]}
    for states in optimizer.state.values():
        held |= {id(value): value for value in states.values() if isinstance(value, torch.Tensor)}
    own = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    if engine.groups.place.dp == 0:
        own += 2 * sum(
            getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            for parameter in engine.module.parameters()
        )
    total = torch.tensor(float(own), dtype=torch.float64, device=engine.groups.device)
    dist.all_reduce(total)
    return int(total.item())


def write_weights(folder: Path, engine: Engine) -> None:
    """Every rank must call it (ZeRO-3 gathers); of ranks that hold the same share the first writes it."""
    groups, skip = engine.groups, tied_names(engine.plan)
    place = groups.layout.tensor_place(groups.rank)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in engine.layers:
        name, module = layer.plan.name, layer.module
        with ExitStack() as gathered:
            for parameters in apart_by_group(module.parameters()):
                gathered.enter_context(deepspeed.zero.GatheredParameters(parameters))
            state = {key: tensor for key, tensor in state_of(module).items() if f"{name}.{key}" not in skip}
            write_layer(
                folder, name, state, place, dense=groups.place.dp == 0, experts=groups.experts.place.edp == 0
            )


def apart_by_group(parameters: Iterable[Any]) -> list[list[Any]]:
    """Those that ZeRO-3 shards, by the ranks over which it does: they are gathered together or not at all."""
    by_group: dict[int, list[Any]] = defaultdict(list)
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            by_group[id(parameter.ds_process_group)].append(parameter)
    return list(by_group.values())


def find(run: Run, groups: Groups) -> Path | None:
    """The checkpoint this run goes on from, whole and of the same layout; every rank gets the same answer.

    A run that began from another run's checkpoint (`checkpoint.resume=FOLDER`) goes on from its own as soon as it has
    one, so that the same command may be started again and again.
    """
    names, refusal = _told_by_first(groups, _candidates(run) if groups.is_first else None)
    if refusal is not None:
        raise RunError(refusal)
    damaged: list[Path] = []
    for name in names:
        folder = Path(name)
        faults = _faults_together(folder, groups)
        state = None if faults else readable_state(folder)
        if state is None:
            faults = faults or [f"no {STATE} in {manifest.MANIFEST}"]
        else:
            check_fits(state, run, folder)
            _refuse_strangers(folder, groups)
            if groups.is_first:
                for other in damaged:
                    store.set_aside(other)
            return folder
        damaged.append(folder)
        if groups.is_first:
            log.warning("%s", _damage(folder, faults))
    if damaged:
        raise RunError(
            f"{_damage(damaged[0], faults if len(damaged) == 1 else [])}, and there is no whole one to go on from; "
            "use another name to start anew, or put back what is missing"
        )
    return None


def _refuse_strangers(folder: Path, groups: Groups) -> None:
    """Each rank looks into its share of DeepSpeed's files; all of them refuse what one has found."""
    files = sorted((folder / ENGINE).rglob("*.pt"))[groups.rank :: groups.layout.world_size]
    found: list[str | None] = [None] * groups.layout.world_size
    dist.all_gather_object(found, plain_loads.first_stranger(files))
    what = next((words for words in found if words is not None), None)
    if what is not None:
        raise RunError(plain_loads.refusal(folder, what))


def find_source(run: Run, groups: Groups) -> Path | None:
    """The checkpoint whose weights a new run begins with, whole; every rank calls it and gets the same answer."""
    source = run.config.checkpoint.weights_from
    if source is None:
        return None
    damage = ""
    for folder in store.meant(source, key="checkpoint.weights_from"):
        faults = _faults_together(folder, groups, without=ENGINE)
        if not faults:
            return folder
        damage = damage or _damage(folder, faults)
        if groups.is_first:
            log.warning("%s", _damage(folder, faults))
    raise RunError(f"checkpoint.weights_from={source}: {damage}, and there is no whole one to begin with")


def placement_of_newest(run: Run, groups: Groups) -> dict[str, Any] | None:
    """Where layers lay in the newest checkpoint that this run may go on from; None without one."""
    found = None
    if groups.is_first:
        names, _ = _candidates(run)
        states = (readable_state(Path(name)) for name in names)
        layout = next((state.layout for state in states if state is not None), None)
        if layout is not None:
            found = {key: layout[key] for key in ("chunks", "placement") if key in layout}
    return _told_by_first(groups, found)


def _candidates(run: Run) -> tuple[list[str], str | None]:
    """Checkpoints that may be gone on from, the best first; or why there can be none."""
    root, resume = run.checkpoints, run.config.checkpoint.resume
    own = store.checkpoints(root)
    if resume == "never" and own:
        return [], (
            f"checkpoint.resume=never: {root} holds an earlier run's checkpoints, which this one would mix "
            "with; use another name, or remove that folder"
        )
    if resume in ("never", "auto"):
        return [str(folder) for folder in own], None
    try:
        folder = store.wanted(resume, key="checkpoint.resume")
    except RunError as refusal:  # only the first rank looks; the others must hear of it
        return [], str(refusal)
    if folder.resolve().parent != root.resolve():
        return [str(path) for path in own] or [str(folder)], None
    later = [path.name for path in own if store.step_of(path) > store.step_of(folder)]
    if later:
        return [], (
            f"checkpoint.resume={resume}: this run went on from there to {later[0]}, and its files would mix with "
            "those to come; add name=ANOTHER, which starts a run of its own from that checkpoint"
        )
    return [str(folder)], None


def _damage(folder: Path, faults: Sequence[str]) -> str:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"checkpoint {folder} is damaged" + (f": {faults[0]}{more}" if faults else "")


def load(folder: Path, engine: Engine) -> RunState:
    """Put the engine where the checkpoint left it; every rank calls it."""
    engine.load(folder / ENGINE)
    groups = engine.groups
    if groups.layout.ep > 1 and engine.deepspeed.zero_optimization_stage() < 3:
        restore = ExpertRestorer(folder / WEIGHTS, groups.layout.tensor_place(groups.rank))
        for layer in engine.layers:
            restore(layer.plan.name, layer.module)
    return read_state(folder)


def ranks_share_a_disk(folder: Path, groups: Groups) -> bool:
    """Whether all ranks see what the first rank writes into ``folder``."""
    probe = folder / ".shared-disk"
    if groups.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("seen by all ranks?\n", "utf-8")
    wait_for_all()
    blind = groups.any_rank(not probe.exists())
    wait_for_all()
    if groups.is_first:
        probe.unlink()
    return not blind


def _hash_together(folder: Path, groups: Groups) -> list[manifest.FileRecord]:
    """Each rank hashes its share of the files; the first rank gets all records."""
    mine = [
        manifest.record(folder, path)
        for path in manifest.files_of(folder)[groups.rank :: groups.layout.world_size]
    ]
    gathered: list[list[manifest.FileRecord] | None] | None = (
        [None] * groups.layout.world_size if groups.is_first else None
    )
    dist.gather_object(mine, gathered)
    return [item for share in gathered or [] for item in share or []]


def _faults_together(folder: Path, groups: Groups, *, without: str | None = None) -> list[str]:
    mine = list(manifest.faults(folder, share=groups.rank, shares=groups.layout.world_size, without=without))
    gathered: list[list[str] | None] = [None] * groups.layout.world_size
    dist.all_gather_object(gathered, mine)
    return [fault for share in gathered for fault in share or []]


def _has_room(root: Path, expected_bytes: int) -> bool:
    """Judged by the size of the last checkpoint, or before there is one by the tensors that it will hold."""
    root.mkdir(parents=True, exist_ok=True)
    earlier = store.checkpoints(root)
    size = sum(path.stat().st_size for path in manifest.files_of(earlier[0])) if earlier else expected_bytes
    needed, free = SPARE_SPACE * size, shutil.disk_usage(root).free
    if free < needed:
        log.warning("no checkpoint: %s free under %s, %s needed", size_told(free), root, size_told(needed))
    return free >= needed


def _told_by_first(groups: Groups, value):  # type: ignore[no-untyped-def]
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
