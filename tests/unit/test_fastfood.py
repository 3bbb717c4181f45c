"""Fastfood, Le et al. 2013: the fast operator is the matrix of the paper, and its adjoint is the adjoint."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafit import fastfood
from lorafit.fastfood import Fastfood, Part, factors, matrices, parts_of, power_of_two, sylvester, walsh_hadamard

CPU = torch.device("cpu")
SIZES = [(1, 1), (2, 1), (5, 3), (37, 5), (64, 10), (64, 64), (100, 33), (129, 129)]


@pytest.fixture(params=[4, 16, 2**16], ids=lambda size: f"pieces of {size}")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vectors, worked on in as many pieces as large ones."""
    monkeypatch.setitem(fastfood.PIECE, "cpu", request.param)


def columns(operator: Fastfood) -> Tensor:
    """P, column by column, (D, d)."""
    return torch.stack([operator.project(unit) for unit in torch.eye(operator.signs.shape[0]).double()], 1)


def naive_hadamard(n: int) -> Tensor:
    """Entry i, j is −1 to the number of bits that i and j have in common."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)


def textbook(size: int, dim: int, seed: int) -> Tensor:
    """H G Π H B / √(D Σ G²) with matrices of size L, cut to (D, d)."""
    length = power_of_two(size)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(length).double()
    signs[:dim] = torch.randint(0, 2, (dim,), generator=generator).mul(2).sub(1).double()
    order = torch.randperm(length, generator=generator, dtype=torch.int32).long()
    gain = torch.empty(length).normal_(generator=generator).double()
    h = naive_hadamard(length)
    permutation = torch.eye(length).double()[order]
    whole = h @ torch.diag(gain) @ permutation @ h @ torch.diag(signs)
    return whole[:size, :dim] / math.sqrt(size * float(gain.square().sum()))


# Walsh-Hadamard ---------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 128])
def test_hadamard_against_its_entries(n):
    h = naive_hadamard(n)
    assert torch.equal(sylvester(n, torch.float64, CPU), h)
    x = torch.randn(n, 3, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), h @ x, rtol=0, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard(x[:, 0]), h @ x[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", range(21))
def test_hadamard_twice_is_its_size(bits):
    n = 2**bits
    small = [len(h) for h in factors(n, torch.float64, CPU)]
    assert math.prod(small) == n and max(small) <= 64
    x = torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), n * x, rtol=0, atol=1e-10 * n)


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]


# P ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dim"), SIZES)
def test_the_matrix_of_the_paper(size, dim, pieces):
    operator = Fastfood.draw(size, dim, seed=3)
    torch.testing.assert_close(columns(operator), textbook(size, dim, seed=3), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("size", "dim"), [*SIZES, (2**17 + 3, 50), (2**16, 2**16)])
def test_the_adjoint(size, dim, pieces):
    operator = Fastfood.draw(size, dim, seed=1)
    v, u = torch.randn(dim, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    left, right = operator.project(v) @ u, v @ operator.adjoint(u)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-13 * float(v.norm() * u.norm()))


@pytest.mark.parametrize(("size", "dim"), [(1, 1), (64, 10), (256, 256)])
def test_columns_have_the_norm_one_when_nothing_is_padded(size, dim):
    norms = columns(Fastfood.draw(size, dim, seed=5)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2**14, 12_000])
def test_columns_are_nearly_orthonormal(size):
    p = columns(Fastfood.draw(size, 60, seed=2))
    difference = p.t() @ p - torch.eye(60).double()
    assert difference.abs().max() < 6 / math.sqrt(size)
    assert difference.square().mean().sqrt() < 1.5 / math.sqrt(size)
    # Entries are those of a normal distribution, with mean 0 and variance 1 / D.
    entries = p * math.sqrt(size)
    assert abs(entries.mean()) < 0.01 and abs(entries.var() - 1) < 0.05
    assert abs((entries**4).mean() - 3) < 0.2


def test_linear():
    operator = Fastfood.draw(300, 20, seed=0)
    a, b = torch.randn(2, 20, dtype=torch.float64)
    sum_ = 2 * operator.project(a) - 3 * operator.project(b)
    torch.testing.assert_close(operator.project(2 * a - 3 * b), sum_, rtol=0, atol=1e-12)


def test_single_precision():
    operator = Fastfood.draw(70_000, 100, seed=0)
    v, u = torch.randn(100, dtype=torch.float64), torch.randn(70_000, dtype=torch.float64)
    for function, x in ((operator.project, v), (operator.adjoint, u)):
        low, high = function(x.float()), function(x)
        assert low.dtype == torch.float32
        assert (low - high).norm() < 1e-6 * high.norm()


def test_a_seed_is_a_matrix():
    state = torch.get_rng_state()
    one, same, other = (Fastfood.draw(200, 30, seed) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state())
    v = torch.randn(30)
    assert torch.equal(one.project(v), same.project(v)) and one.witness == same.witness
    assert not torch.allclose(one.project(v), other.project(v)) and one.witness != other.witness
    torch.randn(5)
    assert one.witness == Fastfood.draw(200, 30, 7).witness


def test_tables_are_small():
    operator = Fastfood.draw(5000, 1000, seed=0)
    assert operator.index.dtype == torch.int16 and operator.gain.dtype == torch.float32
    assert operator.length == 8192 and int(operator.index.max()) == 1023
    assert Fastfood.draw(2**16, 2**15 + 1, seed=0).index.dtype == torch.int32


def test_inputs_are_left_alone():
    operator = Fastfood.draw(200, 30, seed=0)
    v, u = torch.randn(30), torch.randn(200)
    before = v.clone(), u.clone()
    operator.project(v)
    operator.adjoint(u)
    assert torch.equal(v, before[0]) and torch.equal(u, before[1])


# Its parts, differentiable ----------------------------------------------------

PARTS = (Part(0, 3, 4, 0), Part(12, 2, 5, 1), Part(22, 6, 1, 0))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_parts_and_their_gradients(scaled):
    operator = Fastfood.draw(28, 6, seed=4)
    v = torch.randn(6, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.7, 0.0], dtype=torch.float64, requires_grad=True) if scaled else None
    leaves = [v] if lam is None else [v, lam]
    weights = [torch.randn(part.out, part.inn, dtype=torch.float64) for part in PARTS]
    results = []
    for found in (
        parts_of(v, lam, operator, PARTS, None),
        matrices(textbook(28, 6, 4) @ v, lam, PARTS),
    ):
        loss = sum((w * m.square()).sum() for w, m in zip(weights, found, strict=True))
        results.append([*found, *torch.autograd.grad(loss, leaves)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_parts_serve_several_backward_passes():
    operator = Fastfood.draw(28, 6, seed=4)
    v, lam = torch.randn(6, requires_grad=True), torch.randn(2, requires_grad=True)
    calls = []
    found = parts_of(v, lam, operator, PARTS, lambda: calls.append(1))
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad(found[0].square().sum() + found[2].sum(), [v, lam]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(calls) == 2
    (alone,) = torch.autograd.grad(found[1].sum(), [v])
    assert alone.abs().sum() > 0


def test_parts_of_a_frozen_vector():
    operator = Fastfood.draw(28, 6, seed=4)
    v, lam = torch.randn(6), torch.randn(2, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(m.sum() for m in parts_of(v, lam, operator, PARTS, None)), [lam])
    plain = torch.stack([m.sum() for m in matrices(operator.project(v), None, PARTS)])
    torch.testing.assert_close(grad, torch.stack([plain[0] + plain[2], plain[1]]))
    assert not any(m.requires_grad for m in parts_of(v, lam.detach(), operator, PARTS, None))


def test_matrices_and_their_factors_take_the_room_of_p_v_once():
    operator = Fastfood.draw(28, 6, 3)
    v, lam = torch.randn(6, requires_grad=True), torch.tensor([0.5, -2.0], requires_grad=True)
    found = parts_of(v, lam, operator, PARTS, None)
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
    assert found[0].untyped_storage().nbytes() == 4 * operator.length
    for expected, each in zip(matrices(operator.project(v.detach()), lam, PARTS), found, strict=True):
        torch.testing.assert_close(each, expected)


def test_a_factor_that_leaves_nothing_still_has_its_gradient():
    operator, v = Fastfood.draw(28, 6, 3), torch.randn(6)
    found = []
    for value in (1e-38, 0.0, 1.0):
        lam = torch.tensor([value, 1.0], requires_grad=True)
        found.append(torch.autograd.grad(sum(m.sum() for m in parts_of(v, lam, operator, PARTS, None)), lam)[0])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
