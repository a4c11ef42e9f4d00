"""Products of many experts are those of one matrix for each, and their gradients can wait."""

from typing import Any

import pytest
import torch

from model_providers import weight_gradients
from model_providers.experts import ExpertProduct
from model_providers.logical import is_routed_expert
from tests.model_providers.plans import build, llama_like

COUNTS = [[3, 0, 4, 1], [0, 0, 8, 0], [2, 2, 2, 2]]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator, dtype=dtype, requires_grad=True)
    return x, torch.randn(4, 5, 6, generator=generator, dtype=dtype, requires_grad=True)


def one_by_one(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([rows @ matrix.t() for rows, matrix in zip(x.split(counts), weight, strict=True)])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_product_and_gradients_are_exact(counts: list[int]) -> None:
    x, weight = operands(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: ExpertProduct.apply(x, w, counts, False), (x, weight))
    torch.testing.assert_close(ExpertProduct.apply(x, weight, counts, False), one_by_one(x, weight, counts))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_wide_products_are_those_of_fp32_rounded_once(counts: list[int]) -> None:
    x, weight = operands(torch.bfloat16)
    found = ExpertProduct.apply(x, weight, counts, True)
    found.sum().backward()
    wide_x, wide_weight = (tensor.detach().float().requires_grad_() for tensor in (x, weight))
    wanted = one_by_one(wide_x, wide_weight, counts)
    wanted.sum().backward()
    assert torch.equal(found, wanted.bfloat16())
    assert torch.equal(x.grad, wide_x.grad.bfloat16()) and torch.equal(
        weight.grad, wide_weight.grad.bfloat16()
    )


def test_weight_gradients_can_wait() -> None:
    x, weight = operands(torch.float64)
    with weight_gradients.put_aside() as store:
        ExpertProduct.apply(x, weight, COUNTS[0], False).square().sum().backward()
    assert x.grad is not None and weight.grad is None and len(store) == 1
    found: list[Any] = []
    store.compute(lambda parameter, gradient: found.append((parameter, gradient)))
    again, other = operands(torch.float64)
    one_by_one(again, other, COUNTS[0]).square().sum().backward()
    assert found[0][0] is weight
    torch.testing.assert_close(found[0][1], other.grad)


def test_only_routed_experts_are_marked() -> None:
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "shared_ffn_hidden_size": 8}
    built = build(llama_like(moe=moe))
    marked = {name for name, parameter in built.named_parameters().items() if is_routed_expert(parameter)}
    assert marked == {f"layers.{i}.mlp.experts.linear_fc{j}.weight" for i in range(2) for j in (1, 2)}


def test_every_expert_begins_differently_and_by_its_own_name() -> None:
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}
    four = build(llama_like(moe=moe)).named_parameters()["layers.1.mlp.experts.linear_fc1.weight"]
    eight = build(llama_like(moe=moe | {"num_experts": 8})).named_parameters()[
        "layers.1.mlp.experts.linear_fc1.weight"
    ]
    assert torch.equal(four, eight[:4])
    assert len({tuple(expert.flatten().tolist()) for expert in eight}) == 8
