"""The hand-written gradients are the derivatives of what they compute."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from model_providers.fused import GatedSiLU, RMSNorm, SplitHeads, WeightedGatedSiLU
from model_providers.rotary import RotaryTable, Rotate
from tests.model_providers.plans import llama_like

S, B, G, D = 3, 2, 2, 8


def double(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def angles(fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    model = llama_like(rotary_fraction=fraction)
    return RotaryTable(model).cos_sin(1, 1 + S, double(1))


def test_rms_norm_equals_torch() -> None:
    x, weight = double(4, 3, 16), double(16)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-3), F.rms_norm(x, (16,), weight, 1e-3))
    assert gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3), (x, weight))


def test_rms_norm_in_bf16_is_computed_in_fp32() -> None:
    x = (100 * double(64, 32).detach()).bfloat16()
    weight = torch.rand(32).bfloat16()
    exact = F.rms_norm(x.float(), (32,), weight.float(), 1e-5)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-5), exact.bfloat16())


def test_gated_silu_equals_its_plain_spelling() -> None:
    x = double(4, 3, 10)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(GatedSiLU.apply(x), F.silu(gate) * up)
    assert gradcheck(GatedSiLU.apply, (x,))


def test_weighted_gated_silu_equals_its_plain_spelling() -> None:
    x, weight = double(5, 10), double(5)
    torch.testing.assert_close(WeightedGatedSiLU.apply(x, weight), GatedSiLU.apply(x) * weight.unsqueeze(-1))
    assert gradcheck(WeightedGatedSiLU.apply, (x, weight))


def test_weights_of_bf16_tokens_stay_fp32() -> None:
    x, weight = double(64, 32).detach().bfloat16().requires_grad_(), torch.rand(64, requires_grad=True)
    exact = GatedSiLU.apply(x.detach().float()) * weight.detach().unsqueeze(-1)
    found = WeightedGatedSiLU.apply(x, weight)
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2e-2, atol=1e-3)
    found.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("heads_per_group", [1, 3])
def test_split_heads_splits_and_rotates(heads_per_group: int, fraction: float) -> None:
    joined, (cos, sin) = double(S, B, G, heads_per_group + 2, D), angles(fraction)
    query, key, value = SplitHeads.apply(joined, cos, sin)
    torch.testing.assert_close(query, Rotate.apply(joined[..., :-2, :].flatten(2, 3), cos, sin))
    torch.testing.assert_close(key, Rotate.apply(joined[..., -2, :], cos, sin))
    assert torch.equal(value, joined[..., -1, :])
    assert gradcheck(lambda x: SplitHeads.apply(x, cos, sin), (joined,))
    assert gradcheck(lambda x: SplitHeads.apply(x, None, None), (joined,))


def test_rotation_depends_on_the_difference_of_positions_only() -> None:
    """Su et al. 2021, section 3.3: <R_m q, R_n k> is a function of m - n; this is why packed documents need
    no restart.
    """
    query, key = double(1, 1, 1, D).expand(S, 1, 1, D), double(1, 1, 1, D + 0).expand(S, 1, 1, D).flip(-1)
    scores = []
    for start in (0, 40):
        cos, sin = RotaryTable(llama_like()).cos_sin(start, start + S, query)
        q, k = Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
        scores.append(torch.einsum("sbnd,tbnd->st", q, k))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert gradcheck(lambda x: Rotate.apply(x, *angles(0.5)), (double(S, B, G, D),))


def test_the_rotary_table_is_made_once_and_grows() -> None:
    table, like = RotaryTable(llama_like()), torch.zeros(1)
    cos, _ = table.cos_sin(0, 8, like)
    assert table.cos_sin(0, 8, like)[0].data_ptr() == cos.data_ptr()
    longer, sin = table.cos_sin(4, 16, like)
    assert longer.shape == (12, 1, 1, 8) and sin.shape == (12, 1, 1, 4)
    torch.testing.assert_close(longer[:4], cos[4:])
    assert table.cos_sin(0, 8, like.bfloat16())[0].dtype == torch.bfloat16
