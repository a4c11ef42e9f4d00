"""Transformer Engine's FP8, entered block by block, with scales that change between optimizer steps only.

Left to itself, Transformer Engine updates the delayed scales of *all* layers each time its outermost context is left,
and in the backward pass of each context's first module (pytorch/quantization.py: autocast_exit, is_first_fp8_module).
Entered per layer, histories would roll once for each layer and micro-batch, with as many collectives; megatron-core
refuses bf16 layers beside delayed scaling for that (fp8_utils.py, get_fp8_context).  So a context that is switched off
lies around all passes of a step: no inner one is the outermost, no module the first, and the one update is made when
the step has ended, from the largest values of its micro-batches.  Scales then do not depend on the order in which a
pipeline works off micro-batches, a recomputed pass meets those of the first one without Transformer Engine's own
checkpoint, and a window counts steps.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from model_providers.fp8.config import Fp8Config, Recipe
from model_providers.layer_plan import PlanModule

# Of transformer_engine.common.recipe, and of FP8GlobalStateManager in transformer_engine.pytorch.
CLASSES: dict[Recipe, str] = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
QUESTIONS: dict[Recipe, str] = {
    "delayed": "is_fp8_available",
    "current": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}
DIRECTIONS = ("fwd", "bwd")  # scaling_fwd: input, weight, output; scaling_bwd: gradients of output and input

Context = Callable[..., AbstractContextManager[Any]]


class Library(NamedTuple):
    """What this file uses of Transformer Engine, in the version at hand."""

    recipes: Any  # transformer_engine.common.recipe
    manager: Any  # FP8GlobalStateManager
    context: Context  # enabled, recipe, group


def open_library() -> Library:
    """Of an installation that loads (see `kernels.transformer_engine_obstacle`), 2.4 or newer."""
    top = importlib.import_module("transformer_engine.pytorch")
    is_new = importlib.util.find_spec("transformer_engine.pytorch.quantization") is not None  # from 2.9 on
    states = importlib.import_module(f"transformer_engine.pytorch.{'quantization' if is_new else 'fp8'}")

    def context(*, enabled: bool, recipe: Any, group: Any) -> AbstractContextManager[Any]:
        if is_new:
            return top.autocast(enabled=enabled, recipe=recipe, amax_reduction_group=group)
        return top.fp8_autocast(enabled=enabled, fp8_recipe=recipe, fp8_group=group)

    return Library(
        importlib.import_module("transformer_engine.common.recipe"), states.FP8GlobalStateManager, context
    )


def recipe_obstacle(library: Library, facts: Fp8Config) -> str | None:
    """Why this hardware or version cannot follow the recipe, in Transformer Engine's own words where it has some."""
    if facts.recipe == "current" and facts.margin:
        return f"Transformer Engine's current scaling leaves no margin, and fp8.margin={facts.margin}"
    question = getattr(library.manager, QUESTIONS[facts.recipe], None)
    if CLASSES[facts.recipe] not in vars(library.recipes) or question is None:
        return f"this version of Transformer Engine has no {CLASSES[facts.recipe]} (a newer one has)"
    is_able, reason = question()
    return None if is_able else reason.rstrip(".")


def recipe_of(library: Library, facts: Fp8Config) -> Any:
    """Transformer Engine's recipe; formats are its defaults, which are ours (see `scaling`)."""
    named = vars(library.recipes)[CLASSES[facts.recipe]]
    if facts.recipe == "delayed":
        return named(margin=facts.margin, amax_history_len=facts.amax_history)
    return named()


class Steps:
    """Of the blocks of one model: which context they enter, and when delayed scales change."""

    def __init__(self, library: Library, facts: Fp8Config, group: Any, *, keeps_weights: bool):
        """``group``: the ranks that hold the same layers, over which delayed scales are agreed on.

        ``keeps_weights``: eight-bit weights of a step's first micro-batch serve the others too; not where a first pass
        without gradients makes them, since those have no transposed half.
        """
        self.keeps_weights, self._library, self._group = keeps_weights, library, group
        self._recipe, self._is_delayed = recipe_of(library, facts), facts.recipe == "delayed"
        self._around: AbstractContextManager[Any] | None = None

    def entered(self) -> AbstractContextManager[Any]:
        """The context of one block's work in eight bits.

        Not for delayed scaling's passes with gradients outside of steps, as when layers are measured: each would change
        scales, on this rank or that.
        """
        if self._is_delayed and self._around is None and torch.is_grad_enabled():
            return nullcontext()
        return self._library.context(enabled=True, recipe=self._recipe, group=self._group)

    def begin(self) -> None:
        """Before the first pass of a step."""
        if self._is_delayed and self._around is None:
            self._around = self._library.context(enabled=False, recipe=self._recipe, group=self._group)
            self._around.__enter__()
            self._library.manager.is_first_fp8_module()  # asking takes it: no backward pass updates scales

    def end(self) -> None:
        """After the last pass of a step."""
        if self._around is not None:
            self._around.__exit__(None, None, None)
            self._around = None

    def update(self) -> None:
        """Scales for the next step, from the largest values that any rank of the group has seen; collective."""
        if self._is_delayed:
            for forward in (True, False):
                self._library.manager.reduce_and_update_fp8_tensors(forward=forward)


class EightBitBlock:
    """Of one block: calling it gives the context of its work; between steps it holds what is to be remembered."""

    def __init__(self, facts: Fp8Config, steps: Steps, linear_types: tuple[type, ...]):
        self.facts, self.steps, self.name = facts, steps, ""
        self.has_begun, self.is_barred = True, False
        self.linears: dict[str, Any] = {}  # by their names inside of the block
        self._types = linear_types
        self._to_restore: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def is_on(self) -> bool:
        return self.has_begun and not self.is_barred

    def __call__(self) -> AbstractContextManager[None]:
        return self._entered() if self.is_on else nullcontext()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self.steps.entered():
            if self._to_restore:
                self._put_back()
            yield

    def adopt(self, module: nn.Module, name: str) -> None:
        """The block's module, once it is built, and what the whole model calls it."""
        self.name = name
        self.linears = {path: part for path, part in module.named_modules() if isinstance(part, self._types)}
        self.keep_weights(False)

    def keep_weights(self, kept: bool) -> None:
        """Whether the next pass makes eight-bit weights that others take over (megatron-core's TELinear.forward).

        Nobody else tells its linears that a step begins; they would keep the first weights for ever.
        """
        for linear in self.linears.values():
            linear.disable_parameter_transpose_cache, linear.is_first_microbatch = not kept, True

    def forget_seen(self) -> None:
        """Of the largest values since the last update: an evaluation's, or those of a step that was not applied."""
        for linear in self.linears.values():
            for history in _of_linear(linear, "amax_history").values():
                history[0].zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember beside weights."""
        known = self._to_restore
        if self.facts.recipe == "delayed" and not known:
            scales = {path: _scales(linear) for path, linear in self.linears.items()}
            known = {path: tensors for path, tensors in scales.items() if tensors}
        return {"is_barred": self.is_barred, **({"te": known} if known else {})}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Scales are put back at first use, since Transformer Engine makes room for them no sooner."""
        self.is_barred = bool(state["is_barred"])
        self._to_restore = dict(state.get("te", {})) if self.facts.recipe == "delayed" else {}

    def _put_back(self) -> None:
        saved, self._to_restore = self._to_restore, {}
        for path, tensors in saved.items():
            if path in self.linears:
                self.linears[path].init_fp8_metadata(num_gemms=1)
                _restore_scales(self.linears[path], tensors)


def _of_linear(linear: Any, what: str) -> dict[str, torch.Tensor]:
    """By direction; nothing of a linear that has not run yet, or whose recipe remembers nothing."""
    found = {way: linear.fp8_meta.get(f"scaling_{way}") for way in DIRECTIONS}
    return {
        way: vars(state)[what] for way, state in found.items() if state is not None and what in vars(state)
    }


def _scales(linear: Any) -> dict[str, torch.Tensor]:
    """scale_fwd [3], scale_bwd [2], amax_history_fwd [window 3], amax_history_bwd [window 2], on the CPU"""
    return {
        f"{what}_{way}": tensor.detach().cpu()
        for what in ("scale", "amax_history")
        for way, tensor in _of_linear(linear, what).items()
    }


def _restore_scales(linear: Any, tensors: dict[str, torch.Tensor]) -> None:
    """In place: Transformer Engine's update holds views."""
    for what in ("scale", "amax_history"):
        for way, here in _of_linear(linear, what).items():
            saved = tensors[f"{what}_{way}"]
            if saved.shape == here.shape:
                here.copy_(saved)
            else:  # a window of another length: row 0 is the step at hand, and the newest of the past come last
                here.zero_()
                num_kept = min(len(here), len(saved)) - 1
                here[len(here) - num_kept :].copy_(saved[len(saved) - num_kept :])


class EightBitBlocks(Sequence[EightBitBlock]):
    """All of a rank, through the steps."""

    def __init__(self, blocks: Sequence[EightBitBlock]):
        self._blocks = tuple(blocks)
        self._steps = tuple({id(block.steps): block.steps for block in blocks}.values())

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def begin_passes(self, *, keeps_copies: bool) -> None:
        """``keeps_copies``: as in `eight_bits.EightBits`."""
        for block in self._blocks:
            block.forget_seen()
            block.keep_weights(keeps_copies and block.steps.keeps_weights)
        for steps in self._steps:
            steps.begin()

    def end_passes(self) -> None:
        for steps in self._steps:
            steps.end()
        for block in self._blocks:
            block.keep_weights(False)

    def end_step(self, *, applied: bool) -> None:
        """Every rank calls it."""
        if not applied:
            for block in self._blocks:
                block.forget_seen()
            return
        for steps in self._steps:
            steps.update()


def eight_bit_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module, EightBitBlock]]:
    """Path, module and precision of all blocks in ``module`` that enter Transformer Engine's context, in order."""
    for path, part in module.named_modules():
        if isinstance(part, PlanModule) and isinstance(part.precision, EightBitBlock):
            yield path, part, part.precision


def name_blocks(module: nn.Module, name: str) -> None:
    """Tell each block of the layer called ``name`` which module is its own, and what the whole model calls it."""
    for path, part, block in eight_bit_blocks(module):
        block.adopt(part, f"{name}.{path}" if path else name)
