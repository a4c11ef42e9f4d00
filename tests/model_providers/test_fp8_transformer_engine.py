"""Transformer Engine's FP8 through a stand-in of its state machine: when scales change, and what is remembered."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_providers import building
from model_providers.building import checkpoint, solo_groups
from model_providers.errors import ModelError
from model_providers.fp8 import choice
from model_providers.fp8.choice import choose_fp8, te_fp8
from model_providers.fp8.config import Fp8Config
from model_providers.fp8.transformer_engine import (
    EightBitBlocks,
    Library,
    eight_bit_blocks,
    open_library,
    recipe_obstacle,
)
from model_providers.kernels import Kernels, torch_kernels
from model_providers.layer_plan import GPTInputs
from model_providers.layout import Layout
from tests.model_providers.plans import Built, batch, build, llama_like
from tests.model_providers.te_stand_in import StandIn, stand_in
from tests.model_providers.test_kernels import packages, write_package

MODEL = llama_like(num_layers=4)
DELAYED = Fp8Config(recipe="delayed", backend="te", amax_history=4)
CPU = torch.device("cpu")
__all__ = ["packages"]  # a fixture


class Model:
    """Built with the stand-in, and driven as an engine drives it."""

    def __init__(self, facts: Fp8Config = DELAYED, **options: Any):
        self.built: Built = build(MODEL, fp8=facts, **options)
        self.blocks = EightBitBlocks([block for _, _, block in eight_bit_blocks(self.built.layers)])
        self.linears = [part for part in self.built.layers.modules() if isinstance(part, StandIn)]
        self.tokens, self.targets = batch(MODEL)

    @property
    def manager(self) -> Any:
        return self.linears[0].manager

    def forward_backward(self) -> torch.Tensor:
        loss = self.built.plan.loss(self.built(GPTInputs(self.tokens)), self.targets)
        loss.backward()
        return loss.detach()

    def step(self, num_passes: int = 1, *, applied: bool = True, keeps_copies: bool = True) -> list[float]:
        self.blocks.begin_passes(keeps_copies=keeps_copies)
        losses = [float(self.forward_backward()) for _ in range(num_passes)]
        self.blocks.end_passes()
        self.blocks.end_step(applied=applied)
        return losses

    def scales(self) -> list[torch.Tensor]:
        return [
            linear.fp8_meta[f"scaling_{way}"].scale.clone() for linear in self.fp8 for way in ("fwd", "bwd")
        ]

    @property
    def fp8(self) -> list[StandIn]:
        return [linear for linear in self.linears if linear.fp8_meta]


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> tuple[Library, Kernels]:
    """Choices that end at a stand-in, a new one for each model: a process trains one."""
    made = [stand_in()]

    def choose_kernels(wanted: str, device: str, dtype: torch.dtype) -> Kernels:
        made.append(stand_in())
        return made[-1][1]

    monkeypatch.setattr(building, "choose_kernels", choose_kernels)
    monkeypatch.setattr(choice, "transformer_engine_obstacle", lambda device: None)
    monkeypatch.setattr(choice, "open_library", lambda: made[-1][0])
    return made[0]


@pytest.mark.usefixtures("te")
def test_blocks_between_the_first_and_the_last_are_in_eight_bits() -> None:
    model = Model()
    assert [block.name for block in model.blocks] == ["layers.1", "layers.2"]
    model.step()
    assert len(model.fp8) == 2 * 4 < len(model.linears)


@pytest.mark.usefixtures("te")
def test_scales_change_once_a_step_however_many_passes_it_has() -> None:
    model = Model()
    model.step()
    before = model.scales()
    model.blocks.begin_passes(keeps_copies=True)
    for _ in range(3):
        model.forward_backward()
        assert all(map(torch.equal, model.scales(), before))
    model.blocks.end_passes()
    model.blocks.end_step(applied=True)
    assert not all(map(torch.equal, model.scales(), before))
    assert model.manager.num_updates == 4  # forward and backward of two steps


@pytest.mark.usefixtures("te")
def test_left_to_itself_it_would_change_scales_within_a_pass() -> None:
    """The stand-in does what the real one does; without this, the test before could not fail."""
    model = Model()
    model.step()
    before, entered = model.scales(), model.manager.num_updates
    library_context = model.blocks[0].steps._library.context
    for block in model.blocks:
        block.steps.entered = lambda: library_context(  # type: ignore[method-assign]
            enabled=True, recipe=model.manager.recipe_and_group[0], group=None
        )
    model.forward_backward()
    assert model.manager.num_updates == entered + 4
    assert not all(map(torch.equal, model.scales(), before))


@pytest.mark.usefixtures("te")
def test_an_evaluation_leaves_no_trace_in_scales() -> None:
    one, other = Model(), Model()
    for model in (one, other):
        model.step()
    with torch.no_grad():
        for layer in other.built.layers.values():
            layer.eval()
        other.built(GPTInputs(other.tokens.flip(1)))
        other.built(GPTInputs(torch.zeros_like(other.tokens)))
        for layer in other.built.layers.values():
            layer.train()
    one.step(), other.step()
    assert all(map(torch.equal, one.scales(), other.scales()))


@pytest.mark.usefixtures("te")
def test_a_step_that_was_not_applied_does_not_count() -> None:
    model = Model()
    model.step()
    before = model.scales()
    model.linears[4].fp8_meta["scaling_fwd"].amax_history[0, 0] = torch.inf
    model.step(applied=False)
    assert all(map(torch.equal, model.scales(), before))
    assert all(
        torch.isfinite(linear.fp8_meta["scaling_fwd"].amax_history).all() and not history[0].any()
        for linear in model.fp8
        for history in [linear.fp8_meta["scaling_fwd"].amax_history]
    )


@pytest.mark.usefixtures("te")
def test_a_recomputed_pass_meets_the_scales_of_the_first_one() -> None:
    model = Model()
    model.step()
    model.built.layers.zero_grad()
    layers = list(model.built.layers.values())
    model.blocks.begin_passes(keeps_copies=False)
    plain = model.built.plan.loss(model.built(GPTInputs(model.tokens)), model.targets)
    wanted = torch.autograd.grad(plain, layers[2].parameters())
    wire: Any = layers[0](model.tokens)
    for layer in layers[1:5]:
        wire = checkpoint(layer, wire)
    for layer in layers[5:]:
        wire = layer(wire)
    model.built.plan.loss(wire, model.targets).backward()
    for gradient, parameter in zip(wanted, layers[2].parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("te")
def test_weights_are_quantised_once_a_step_and_never_stale() -> None:
    model = Model()
    one = model.step(num_passes=3)
    assert {linear.num_quantised for linear in model.fp8} == {1}
    with torch.no_grad():
        for linear in model.fp8:
            linear.weight.mul_(-1.0)
        model.built(GPTInputs(model.tokens))
        assert {linear.num_quantised for linear in model.fp8} == {2}, "an evaluation makes its own"
    assert model.step()[0] != one[-1]
    assert {linear.num_quantised for linear in model.fp8} == {3}


@pytest.mark.usefixtures("te")
@pytest.mark.parametrize("options", [{"keeps_copies": False}, {"recompute": True}], ids=str)
def test_no_eight_bit_weight_outlives_its_pass_where_it_must_not(options: dict[str, bool]) -> None:
    from_plan = {"recompute": building.Recompute("full")} if options.pop("recompute", False) else {}
    model = Model(**from_plan)
    model.step(num_passes=2, **options)
    assert {linear.num_quantised for linear in model.fp8} == {2}
    assert all(linear.kept is None for linear in model.fp8)


@pytest.mark.usefixtures("te")
def test_a_barred_block_and_one_before_its_step_run_in_the_wide_format() -> None:
    model = Model()
    model.blocks[0].is_barred, model.blocks[1].has_begun = True, False
    losses = model.step()
    assert not model.fp8
    assert losses == [float(Model(Fp8Config(recipe="delayed", bf16_first=2, bf16_last=2)).forward_backward())]


@pytest.mark.usefixtures("te")
def test_delayed_scales_are_not_touched_outside_of_steps() -> None:
    model = Model()
    model.forward_backward()  # as when layers are measured
    assert not model.fp8 and model.manager.num_updates == 0


@pytest.mark.usefixtures("te")
def test_a_resumed_block_goes_on_as_if_it_had_not_stopped() -> None:
    whole, first, second = Model(), Model(), Model()
    wanted = [whole.step() for _ in range(3)][-1]
    first.step(), first.step()
    first.blocks[1].is_barred = False
    for block, again in zip(first.blocks, second.blocks, strict=True):
        again.restore(block.state(), CPU)
    assert [block.state().keys() for block in second.blocks] == [
        block.state().keys() for block in first.blocks
    ]
    assert second.step() == wanted
    assert all(map(torch.equal, second.scales(), whole.scales()))


@pytest.mark.usefixtures("te")
@pytest.mark.parametrize("window", [2, 1, 16])
def test_another_window_takes_over_scales_and_what_it_has_room_for(window: int) -> None:
    first = Model()
    for _ in range(3):
        first.step()
    second = Model(DELAYED.model_copy(update={"amax_history": window}))
    for block, again in zip(first.blocks, second.blocks, strict=True):
        again.restore(block.state(), CPU)
    second.blocks.begin_passes(keeps_copies=True)
    second.forward_backward()
    assert all(map(torch.equal, second.scales(), first.scales()))
    old, new = (model.fp8[0].fp8_meta["scaling_fwd"].amax_history for model in (first, second))
    num_kept = min(window, 4) - 1
    assert torch.equal(new[len(new) - num_kept :], old[len(old) - num_kept :])


@pytest.mark.usefixtures("te")
def test_scales_of_our_own_linears_are_left() -> None:
    model = Model()
    model.blocks[0].restore({"is_barred": True, "history": {"num_steps": 3}}, CPU)
    assert model.blocks[0].is_barred
    model.step()
    assert "te" not in model.blocks[0].state() and "te" in model.blocks[1].state()


def test_extra_states_never_reach_files_and_are_never_asked_for(te: tuple[Library, Kernels]) -> None:
    """Strict loading in both directions, whatever lies in the file."""
    model = Model()
    model.step()
    layer = next(
        part for part in model.built.layers.values() if any(isinstance(p, StandIn) for p in part.modules())
    )
    wrapped = nn.Sequential(layer)  # DeepSpeed's root is a module of another kind
    linear = next(part for part in layer.modules() if isinstance(part, StandIn))
    assert linear.get_extra_state().numel() > 0
    for module in (layer, wrapped):
        state = module.state_dict()
        assert state and not [name for name in state if "_extra_state" in name]
        module.load_state_dict(state, strict=True)
        linear_name = next(name for name in state if name.endswith("weight")).replace(
            "weight", "_extra_state"
        )
        module.load_state_dict({**state, linear_name: torch.ones(9, dtype=torch.uint8)}, strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict({name: state[name] for name in list(state)[1:]}, strict=True)


# ---- the choice


def facts(recipe: str, backend: str = "auto", **more: Any) -> Fp8Config:
    return Fp8Config(recipe=recipe, backend=backend, **more)  # type: ignore[arg-type]


REASON = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9"


def test_auto_takes_transformer_engine_where_the_hardware_knows_the_recipe(
    te: tuple[Library, Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.fp8.choice"):
        chosen = choose_fp8(facts("current"), te[1], CPU, solo_groups(), recomputes=False)
    assert chosen(te[1]).name == "stand-in, current fp8"
    assert [record.getMessage() for record in caplog.records] == [
        "fp8.backend=auto: Transformer Engine's current recipe"
    ]


def test_auto_falls_back_to_torch_with_the_reason(
    te: tuple[Library, Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.fp8.choice"):
        chosen = choose_fp8(facts("blockwise"), te[1], CPU, solo_groups(), recomputes=False)
    assert "Fp8Column" in chosen(te[1]).column_linear.__name__
    assert [record.getMessage() for record in caplog.records] == [
        f"fp8.backend=auto: torch, because {REASON}"
    ]


@pytest.mark.parametrize(
    "wanted, said",
    [
        (facts("blockwise", "te"), REASON),
        (
            facts("nvfp4", "te"),
            "this version of Transformer Engine has no NVFP4BlockScaling (a newer one has)",
        ),
        (
            facts("mxfp8", "te"),
            "this version of Transformer Engine has no MXFP8BlockScaling (a newer one has)",
        ),
        (
            facts("current", "te", margin=1),
            "Transformer Engine's current scaling leaves no margin, and fp8.margin=1",
        ),
    ],
    ids=lambda value: value.recipe if isinstance(value, Fp8Config) else "",
)
def test_what_transformer_engine_cannot_is_refused_in_its_own_words(
    te: tuple[Library, Kernels], wanted: Fp8Config, said: str
) -> None:
    with pytest.raises(ModelError) as refusal:
        choose_fp8(wanted, te[1], CPU, solo_groups(), recomputes=False)
    assert str(refusal.value) == (
        f"fp8.backend=te with fp8.recipe={wanted.recipe}: {said}; use fp8.backend=torch, or auto, which falls back by "
        "itself"
    )


def test_torch_layers_are_no_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "transformer_engine_obstacle", lambda device: None)
    with pytest.raises(
        ModelError, match=r"fp8\.backend=te .*: the layers are torch's; use fp8\.backend=torch"
    ):
        choose_fp8(facts("current", "te"), torch_kernels(), CPU, solo_groups(), recomputes=False)


def test_without_cuda_the_reason_is_that() -> None:
    with pytest.raises(
        ModelError, match=r"Transformer Engine runs on CUDA and the device is cpu; use fp8\.backend"
    ):
        build(MODEL, Layout(), fp8=facts("current", "te"))


def test_torch_is_taken_without_a_question(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model_providers.fp8.choice"):
        choose_fp8(facts("current", "torch"), torch_kernels(), CPU, solo_groups(), recomputes=False)
    assert not caplog.records


# ---- versions

OLD = "def fp8_autocast(**words): return ('old', words)"
NEW = "def autocast(**words): return ('new', words)"
RECIPES = """
class DelayedScaling:
    def __init__(self, margin=0, amax_history_len=1024): self.words = (margin, amax_history_len)
class MXFP8BlockScaling: pass
"""
MANAGER = """
class FP8GlobalStateManager:
    @classmethod
    def is_fp8_available(cls): return True, ""
    @classmethod
    def is_mxfp8_available(cls): return False, "Device compute capability 10.0 or higher required for MXFP8 execution."
"""


@pytest.mark.parametrize("age, wanted", [("old", "fp8_recipe"), ("new", "recipe")])
def test_both_names_of_the_context_are_known(packages: Path, age: str, wanted: str) -> None:
    states = "quantization" if age == "new" else "fp8"
    write_package(
        packages,
        {
            "transformer_engine/__init__.py": "",
            "transformer_engine/common/__init__.py": "",
            "transformer_engine/common/recipe/__init__.py": RECIPES,
            "transformer_engine/pytorch/__init__.py": NEW if age == "new" else OLD,
            f"transformer_engine/pytorch/{states}.py": MANAGER,
        },
    )
    library = open_library()
    said, words = library.context(enabled=True, recipe="R", group="G")  # type: ignore[misc]
    assert (said, words[wanted]) == (age, "R") and "G" in words.values()  # type: ignore[has-type]
    assert recipe_obstacle(library, facts("delayed")) is None
    assert recipe_obstacle(library, facts("mxfp8")) == (
        "Device compute capability 10.0 or higher required for MXFP8 execution"
    )


def test_delayed_takes_margin_and_window(te: tuple[Library, Kernels]) -> None:
    made = te_fp8(te[0], facts("delayed", margin=2, amax_history=7), None, recomputes=False)(te[1])
    recipe = made.precision.steps._recipe  # type: ignore[attr-defined]
    assert (recipe.margin, recipe.amax_history_len) == (2, 7)
