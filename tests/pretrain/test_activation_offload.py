"""What layers keep for the backward pass waits on the host: the numbers stay, weights stay, the device is left."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine.activation_offload import NEWEST, Offload

WIDTH, ROWS, LAYERS = 64, 32, 6
LAYER_BYTES = 2 * ROWS * WIDTH * 4  # input of the linear, input of the activation


class Layer(nn.Module):
    """Keeps its input and what the activation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [r h] -> [r h]
        return nn.functional.gelu(self.linear(x))


class Watched(Offload):
    """Remembers which storages were on the device, to see them go."""

    def __init__(self, above_bytes: int = 0):
        super().__init__(torch.device("cpu"), above_bytes=above_bytes)
        self.seen: list[weakref.ref[Any]] = []

    def keep(self, tensor: torch.Tensor) -> Any:
        kept, is_new = super().keep(tensor)
        if is_new:
            self.seen.append(weakref.ref(kept))
        return kept, is_new


@pytest.fixture
def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [Layer() for _ in range(LAYERS)]


def forward(layers: list[Layer], x: torch.Tensor, offload: Offload | None) -> torch.Tensor:
    before = None
    for layer in layers:
        if offload is None:
            x = layer(x)
            continue
        before = offload.group([layer], before=before, inputs=[x])
        with before:
            x = layer(x)
    return x


def gradients(layers: list[Layer], offload: Offload | None) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
    forward(layers, x, offload).square().sum().backward()
    found = [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]
    for layer in layers:
        layer.zero_grad()
    return [one for one in found if one is not None]


def test_gradients_are_the_same_to_the_last_bit(layers: list[Layer]) -> None:
    offload = Watched()
    for one, other in zip(gradients(layers, offload), gradients(layers, None), strict=True):
        assert torch.equal(one, other)
    assert offload.peak_host_bytes == LAYERS * LAYER_BYTES - ROWS * WIDTH * 4, "all but the leaf that came in"
    assert offload.host_bytes == 0, "nothing stays when the backward pass is through"


def test_only_the_newest_groups_are_on_the_device(layers: list[Layer]) -> None:
    offload = Watched()
    output = forward(layers, torch.ones(ROWS, WIDTH), offload)
    on_device = [kept for ref in offload.seen if (kept := ref()) is not None and kept._here is not None]
    assert len(on_device) == 2 * NEWEST
    output.sum().backward()


def test_weights_are_never_offloaded_and_may_move_meanwhile(layers: list[Layer]) -> None:
    """As under ZeRO-3: the weight of the forward pass is gone, and gathered again elsewhere."""
    wanted = gradients(layers, None)
    offload = Watched()
    x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
    output = forward(layers, x, offload)
    for layer in layers:
        home = layer.linear.weight.data
        layer.linear.weight.data = home.clone()
        home.fill_(float("nan"))
    output.square().sum().backward()
    assert torch.equal(x.grad, wanted[0])
    assert offload.peak_host_bytes < LAYERS * LAYER_BYTES


def test_small_tensors_stay(layers: list[Layer]) -> None:
    offload = Watched(above_bytes=ROWS * WIDTH * 4)
    gradients(layers, offload)
    assert offload.peak_host_bytes == 0


def test_a_storage_is_kept_once_and_another_in_its_place_is_another() -> None:
    offload = Watched()
    x = torch.randn(ROWS, WIDTH)
    kept, is_new = offload.keep(x)
    again, is_new_again = offload.keep(x[3:])
    assert again is kept and (is_new, is_new_again) == (True, False)
    changed, is_new = offload.keep(x.mul_(2))
    assert is_new and changed is not kept, "what was saved before is not what is there now"
    kept.leave_device()
    changed.leave_device()
    del x
    other, is_new = offload.keep(torch.randn(ROWS, WIDTH))
    assert is_new and other not in (kept, changed)


def test_a_graph_that_is_dropped_unused_gives_its_memory_back(layers: list[Layer]) -> None:
    offload = Watched()
    output = forward(layers, torch.ones(ROWS, WIDTH), offload)
    assert offload.host_bytes > 0
    del output
    gc.collect()
    assert offload.host_bytes == 0


def test_a_graph_may_be_walked_twice(layers: list[Layer]) -> None:
    offload = Watched()
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    output = forward(layers, x, offload).sum()
    (first,) = torch.autograd.grad(output, x, retain_graph=True)
    (second,) = torch.autograd.grad(output, x)
    assert torch.equal(first, second)
