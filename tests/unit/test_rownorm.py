"""The factored norms of rows, against the formed weight; and what is remembered of tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorafit import rownorm
from lorafit.delta import Delta, Dense, LowRank
from lorafit.errors import MergeError
from lorafit.memo import STEPS, Memo, state
from lorafit.rownorm import row_norm, row_products, row_squares

OUT, INN = 12, 10


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _low_rank(groups: int = 1, mid: bool = False, out: bool = False, r: int = 4) -> LowRank:
    vectors = {"mid": draw(r, seed=4) if mid else None, "out": draw(OUT, seed=5) if out else None}
    return LowRank(draw(OUT, r // groups, seed=2), draw(r, INN, seed=3), scale=0.7, groups=groups, **vectors)


DELTAS = {
    "low-rank": _low_rank(),
    "mid": _low_rank(mid=True),
    "out": _low_rank(out=True),
    "mid-out": _low_rank(mid=True, out=True),
    "grouped": _low_rank(groups=2),
    "grouped-mid-out": _low_rank(groups=4, mid=True, out=True),
    "rank-above": _low_rank(r=20),
    "rank-0": _low_rank(r=0),
    "dense": Dense(draw(OUT, INN, seed=6)),
}


@pytest.fixture(params=list(DELTAS))
def delta(request: pytest.FixtureRequest) -> Delta:
    """A change of each kind, in double precision."""
    return DELTAS[request.param]


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_norms_are_those_of_the_formed_weight(delta, branch, known):
    weight = draw(OUT, INN)
    squares = row_squares(weight) if known else None
    found = row_norm(weight, delta, squares=squares, branch=branch)
    torch.testing.assert_close(found, (weight + delta.dense()).norm(dim=1), rtol=1e-12, atol=1e-12)


def test_products_are_those_of_the_formed_change(delta):
    weight = draw(OUT, INN)
    cross, own = row_products(weight, delta)
    torch.testing.assert_close(cross, (weight * delta.dense()).sum(dim=1))
    torch.testing.assert_close(own, delta.dense().square().sum(dim=1))


def test_without_a_change_it_is_the_norm_of_the_weight():
    weight = draw(OUT, INN).float()
    assert torch.equal(row_norm(weight), row_squares(weight).sqrt())
    nothing = LowRank(torch.zeros(OUT, 2), torch.randn(2, INN))
    assert torch.equal(row_norm(weight, nothing), row_norm(weight))
    torch.testing.assert_close(row_norm(weight), weight.norm(dim=1))


def cancelling(kind: str) -> tuple[Tensor, Delta, list[int]]:
    """(W, Δ, rows in which Δ takes W away)."""
    groups = 2 if kind == "grouped" else 1
    weight, rows = draw(OUT, INN), [1, 7, 8]
    r = OUT  # every row of W is a row of `down`
    up = torch.zeros(OUT, r // groups, dtype=torch.float64)
    for row in rows:
        up[row, row % (OUT // groups)] = -1
    delta = LowRank(up, weight.clone(), groups=groups)
    return weight, Dense(delta.dense()) if kind == "dense" else delta, rows


@pytest.mark.parametrize("kind", ["low-rank", "grouped", "dense"])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_cancel(kind, branch, dtype):
    weight, delta, rows = cancelling(kind)
    found = row_norm(weight.to(dtype), delta.to(dtype), branch=branch)
    assert not found[rows].any()
    others = [row for row in range(OUT) if row not in rows]
    torch.testing.assert_close(found[others], weight.norm(dim=1)[others].to(dtype))
    # All but 0.3 % of a row: the factored form has lost most of its digits in single precision.
    nearly = delta.to(dtype)
    nearly = (
        Dense(nearly.matrix * 0.997)
        if isinstance(nearly, Dense)
        else LowRank(nearly.up * 0.997, nearly.down, groups=nearly.groups)
    )
    found = row_norm(weight.to(dtype), nearly, branch=branch)
    torch.testing.assert_close(
        found, (weight + nearly.to(torch.float64).dense()).norm(dim=1).to(dtype), rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.2, 0.15, 0.14, 0.1, 0.01])
@pytest.mark.parametrize("large", [1, 300])
def test_few_digits_are_lost_however_much_of_a_row_is_taken_away(kept, large):
    """Of ‖W‖ in the direction of Δ only `kept` is left, beside `large` rows that are far from cancelling."""
    weight = draw(OUT, 64).float()
    up = -torch.eye(OUT) * (1 - kept)
    up[OUT // 2 :] *= large
    delta = LowRank(up, weight.clone())
    expected = (weight.double() + delta.to(torch.float64).dense()).norm(dim=1)
    torch.testing.assert_close(row_norm(weight, delta).double(), expected, rtol=3e-5, atol=0)


def test_many_rows_that_cancel_are_formed_a_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(rownorm, "SLICE", 3 * INN)
    weight = draw(OUT, INN)
    delta = LowRank(-torch.eye(OUT, dtype=torch.float64), weight.clone())
    assert not row_norm(weight, delta).any()


def test_slices_change_nothing(monkeypatch):
    weight, deltas = draw(OUT, INN).bfloat16(), [each.to(torch.float32) for each in DELTAS.values()]
    expected = [row_norm(weight, delta) for delta in deltas]
    monkeypatch.setattr(rownorm, "SLICE", 5 * INN)
    for delta, norm in zip(deltas, expected, strict=True):
        torch.testing.assert_close(row_norm(weight, delta), norm)


def test_rows_of_zeros():
    weight = draw(OUT, INN)
    weight[3] = 0
    delta = LowRank(torch.zeros(OUT, 2, dtype=torch.float64), draw(2, INN))
    for branch in (True, False):
        found = row_norm(weight, delta, branch=branch)
        assert found[3] == 0 and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_single_precision_norms(dtype, delta):
    weight, single = draw(OUT, INN).to(dtype), delta.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = row_norm(weight, single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (weight.float() + single.dense()).norm(dim=1))


def test_it_records_no_gradient_and_changes_no_argument(delta):
    weight = draw(OUT, INN).requires_grad_()
    squares = row_squares(weight)
    before = squares.clone()
    assert not row_norm(weight, delta, squares=squares).requires_grad
    assert torch.equal(squares, before)


def test_strided_weights():
    delta = _low_rank()
    stored = draw(INN, OUT)
    torch.testing.assert_close(row_norm(stored.t(), delta), row_norm(stored.t().contiguous(), delta))


def test_a_change_across_groups_has_no_rows_here():
    across = LowRank(draw(OUT, 2), draw(4, 2 * INN), groups=2)
    with pytest.raises(MergeError, match="mixes the groups"):
        row_norm(draw(OUT, INN), across)


def test_it_compiles():
    weight, delta = draw(OUT, INN), _low_rank(groups=2, mid=True)

    def norm(weight: Tensor, up: Tensor, down: Tensor, mid: Tensor) -> Tensor:
        return row_norm(weight, LowRank(up, down, mid, groups=2), branch=False)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    arguments = (weight, delta.up, delta.down, delta.mid)
    torch.testing.assert_close(compiled(*arguments), norm(*arguments))


# Remembering


def test_a_state_changes_with_what_changes():
    tensor, other = torch.zeros(4), torch.zeros(4)
    first = state([tensor])
    assert first == state([tensor]) and first != state([other]) and first != state([tensor], 1)
    assert first != state([tensor[:2]]) and first != state([tensor.view(2, 2)])
    tensor.add_(1)
    assert first != state([tensor])


def test_memory_at_the_same_address_is_other_memory():
    """What an allocator gives out again, as `.to()` there and back does, is not what was seen."""
    memory, seen = bytearray(4000), []
    for _ in range(20):
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        seen.append((tensor.data_ptr(), state([tensor])))
        del tensor
    assert len({address for address, _ in seen}) == 1
    assert all(one[1] != other[1] for one in seen for other in seen if one is not other)


def test_a_fused_step_changes_no_version_but_counts():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    before = state([parameter], STEPS.now)
    optimizer.step()
    assert before != state([parameter], STEPS.now)


def test_no_state_where_nothing_shows_a_change():
    with torch.inference_mode():
        assert state([torch.zeros(2)]) is None
    seen = []
    torch.func.vmap(lambda t: (seen.append(state([t])), t)[1])(torch.zeros(2, 3))
    assert seen == [None]
    with FlopCounterMode(display=False):
        assert state([torch.zeros(2)]) is None


def test_a_memo():
    memo, calls = Memo(), []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(1)

    first = memo.get(("a",), compute)
    assert memo.get(("a",), compute) is first and len(calls) == 1
    assert memo.get(("b",), compute) is not first and len(calls) == 2
    memo.get(None, compute)
    memo.get(None, compute)
    assert len(calls) == 4
    memo.get(("b",), compute)
    assert len(calls) == 4
    copy.deepcopy(memo).get(("b",), compute)
    assert len(calls) == 5
    memo.clear()
    with torch.inference_mode():
        assert not memo.get(("b",), compute).is_inference()
    assert len(calls) == 6


def test_what_is_held_is_what_get_would_give():
    memo: Memo[str] = Memo()
    tensor, other = torch.zeros(4, 4), torch.zeros(4, 4)
    assert memo.held([tensor], 1) is None
    memo.get(state([tensor, other], 1), lambda: "value")
    assert memo.held([tensor, other], 1) == "value"
    for tensors, also in (([other, tensor], (1,)), ([tensor], (1,)), ([tensor, other], (2,)), ([tensor, other], ())):
        assert memo.held(tensors, *also) is None
    for view in (tensor.t(), tensor[1:], tensor.view(16), tensor.view(torch.int32)):
        assert memo.held([view, other], 1) is None
    with FlopCounterMode(display=False):
        assert memo.held([tensor, other], 1) is None
    with torch.inference_mode():
        assert memo.held([torch.zeros(4, 4), other], 1) is None
        assert memo.held([tensor, other], 1) == "value"
    assert copy.deepcopy(memo).held([tensor, other], 1) is None
    other.add_(1)
    assert memo.held([tensor, other], 1) is None


def test_other_memory_at_the_same_address_is_not_held():
    memo: Memo[int] = Memo()
    parameter = torch.nn.Parameter(torch.zeros(1000))
    for _ in range(20):
        memo.get(state([parameter]), lambda: 1)
        parameter.data = parameter.data.bfloat16()
        parameter.data = parameter.data.float()
        assert memo.held([parameter]) is None
