"""diag(out) up diag(mid) in one pass against its plain twin: values, first and second derivatives, what it keeps."""

import pytest
import torch
from torch import Tensor

from lorafit.delta import LowRank
from lorafit.kernels.vectors import upward


def delta(dtype: torch.dtype = torch.float64, **changed: Tensor | int) -> LowRank:
    torch.manual_seed(0)
    parts: dict[str, Tensor | int] = {
        "up": torch.randn(12, 4, dtype=dtype),
        "down": torch.randn(4, 6, dtype=dtype),
        "mid": torch.randn(4, dtype=dtype, requires_grad=True),
        "out": torch.randn(12, dtype=dtype, requires_grad=True),
    }
    return LowRank(**{**parts, **changed})  # type: ignore[arg-type]


def gradients(value: Tensor, of: LowRank) -> tuple[Tensor, ...]:
    seed = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad(value, (of.mid, of.out), seed)  # type: ignore[arg-type]


def test_it_is_its_plain_twin():
    of = delta()
    torch.testing.assert_close(upward(of), of.upward(), rtol=1e-15, atol=0)
    for ours, plain in zip(gradients(upward(of), of), gradients(of.upward(), of), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)


def test_first_and_second_derivatives_are_right():
    of = delta()

    def by(mid: Tensor, out: Tensor) -> Tensor:
        return upward(LowRank(of.up, of.down, mid, out))

    assert torch.autograd.gradcheck(by, (of.mid, of.out))
    assert torch.autograd.gradgradcheck(by, (of.mid, of.out))


def test_it_keeps_no_matrix_but_the_frozen_one():
    of, kept = delta(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()) or each, lambda each: each):
        upward(of)
    assert of.mid is not None and of.out is not None
    assert set(kept) == {of.up.data_ptr(), of.mid.data_ptr(), of.out.data_ptr()}


@pytest.mark.parametrize(
    "changed",
    [
        {"up": torch.randn(12, 4, dtype=torch.float64, requires_grad=True)},
        {"up": torch.randn(12, 2, dtype=torch.float64), "groups": 2},
        {"up": torch.randn(12, 4, dtype=torch.bfloat16)},
        {"mid": None},
        {"out": None},
    ],
    ids=["trained", "grouped", "bf16", "no mid", "no out"],
)
def test_what_it_is_not_for_goes_the_plain_way(changed: dict[str, Tensor | int]):
    of = delta(**changed)
    torch.testing.assert_close(upward(of), of.upward(), rtol=0, atol=0)


def test_a_vector_that_is_not_trained_gets_no_gradient():
    of = delta(mid=torch.ones(4, dtype=torch.float64))
    upward(of).sum().backward()
    assert of.mid is not None and of.out is not None
    assert of.mid.grad is None
    torch.testing.assert_close(of.out.grad, of.up.sum(dim=1), rtol=1e-13, atol=1e-13)
