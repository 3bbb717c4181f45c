"""What initialisers learn from data: input directions and first gradients, and that the model is left as it was."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafit as lf
from lorafit.layers import site_class
from lorafit.method import Sample, Spot
from lorafit.methods import directions as singular
from lorafit.methods.directions import Directions, share_out
from lorafit.methods.evidence import FirstGradients, InputDirections


def place(model: nn.Module, method: lf.LoRA, *paths: str) -> tuple[dict[str, Any], list[Spot]]:
    """Sites and spots for some of a model's layers."""
    modules = {path: model.get_submodule(path) for path in paths}
    sites = {path: site_class(type(module))(module) for path, module in modules.items()}
    return sites, [Spot(path, site.shape, site.weight, method) for path, site in sites.items()]


def gather(evidence: Any, model: nn.Module, method: lf.LoRA, paths: tuple[str, ...], sample: Sample) -> dict[str, Spot]:
    return {spot.path: spot for spot in evidence.gather(model, *place(model, method, *paths), sample)}


def spectrum(*sizes: float, rows: int = 60) -> Tensor:
    """Rows whose directions of variance are the axes turned, with these standard deviations."""
    turn = torch.linalg.qr(torch.randn(len(sizes), len(sizes))).Q
    return torch.randn(rows, len(sizes)) * torch.tensor(sizes) @ turn


def centred_svd(rows: Tensor) -> tuple[Tensor, Tensor]:
    _, s, v = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    return s, v


def same_directions(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    cosines = (found.double() * expected.double()).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=atol, rtol=0)


# --------------------------------------------------------------------------------------------- incremental directions


@pytest.mark.parametrize("parts", [1, 2, 7, 60])
def test_batch_by_batch_is_all_at_once(parts):
    rows = spectrum(5, 3, 2, 1, 0.5) + 4.0
    found = Directions(5)
    for part in rows.chunk(parts):
        found.add(part)
    s, v = centred_svd(rows)
    assert found.count == 60
    torch.testing.assert_close(found.singular.double(), s, atol=1e-4, rtol=1e-5)
    same_directions(found.components, v)
    torch.testing.assert_close(torch.tensor(found.explained()).double(), s**2 / (s**2).sum(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.mean, rows.mean(0))


def test_truncation_keeps_the_directions_that_matter():
    rows = spectrum(9, 6, 4, 0.1, 0.1, 0.05, 0.05, rows=200)
    found = Directions(3)
    for part in rows.chunk(10):
        found.add(part)
    s, v = centred_svd(rows)
    same_directions(found.components, v[:3], atol=1e-3)
    torch.testing.assert_close(torch.tensor(found.explained()).double(), (s**2 / (s**2).sum())[:3], atol=1e-3, rtol=0)


def test_the_randomised_svd_agrees_with_the_exact_one(monkeypatch):
    rows = torch.randn(80, 60) * torch.logspace(1, -2, 60)
    _, exact, v = torch.linalg.svd(rows, full_matrices=False)
    monkeypatch.setattr(singular, "EXACT", 8)
    s, found = singular.leading(rows, 6)
    assert torch.equal(found, singular.leading(rows, 6)[1])
    torch.testing.assert_close(s, exact[:6], atol=1e-4, rtol=1e-4)
    same_directions(found, v[:6], atol=1e-4)


def test_rows_that_are_all_the_same_explain_nothing():
    found = Directions(2)
    for _ in range(3):
        found.add(torch.full((7, 4), 0.1))
    assert found.explained() == []


def test_the_budget_goes_to_the_largest_and_ties_to_the_first():
    assert share_out([[0.5, 0.3], [0.5, 0.4]], 2) == [1, 1]
    assert share_out([[0.5, 0.5], [0.5, 0.4]], 2) == [2, 0]
    assert share_out([[0.5, 0.3], [0.2], []], 3) == [2, 1, 0]
    assert share_out([[0.5], []], 3) == [1, 0]


# ------------------------------------------------------------------------------------------------------------------ EVA


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))


def test_directions_are_those_of_the_layers_inputs():
    model = two_layers()
    batches = [spectrum(5, 4, 3, 2, 1, 1, 1, 1) + 1 for _ in range(3)]
    spots = gather(InputDirections(rho=1), model, lf.LoRA(r=3, init="eva"), ("0", "2"), Sample(batches))
    rows = torch.cat(batches)
    for path, inputs in {"0": rows, "2": torch.tanh(model[0](rows)).detach()}.items():
        assert spots[path].evidence.shape == (3, 8)
        # Truncated to r at each batch, so near the whole's directions, not on them.
        basis = centred_svd(inputs)[1][:3].float()
        kept = (spots[path].evidence @ basis.T).square().sum() / 3
        assert kept > 0.9, path
        identity = spots[path].evidence @ spots[path].evidence.T
        torch.testing.assert_close(identity, torch.eye(3), atol=1e-5, rtol=0)
    one = gather(InputDirections(rho=1), model, lf.LoRA(r=3, init="eva"), ("0", "2"), Sample([rows]))
    same_directions(one["0"].evidence, centred_svd(rows)[1][:3])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 3, 4])
def test_ranks_follow_the_variance_and_their_sum_and_the_scale_stay(rslora, r):
    model = nn.ModuleDict({"sharp": nn.Linear(8, 8), "even": nn.Linear(8, 8)})
    method = lf.LoRA(r=r, alpha=5, rslora=rslora, init="eva")
    inputs = {"sharp": spectrum(9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), "even": torch.randn(60, 8)}

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return sum(model[key](x).sum() for key, x in batch.items())

    spots = gather(InputDirections(), model, method, ("sharp", "even"), Sample([inputs], run))
    ratios = {key: (s**2 / (s**2).sum()).tolist() for key, (s, _) in ((k, centred_svd(x)) for k, x in inputs.items())}
    best = sorted(((x, key) for key, row in ratios.items() for x in row[: 2 * r]), reverse=True)[: 2 * r]
    for key in inputs:
        expected = sum(other == key for _, other in best)
        if expected:
            assert spots[key].method.r == len(spots[key].evidence) == expected
            assert spots[key].method.scale == pytest.approx(method.scale, rel=1e-14)
            assert spots[key].method.rslora is rslora
        else:
            assert key not in spots
    assert sum(spot.method.r for spot in spots.values()) == 2 * r
    assert all(spot.method.r <= 2 * r for spot in spots.values())


def test_a_site_whose_inputs_never_vary_gets_no_adapter():
    model = nn.ModuleDict({"still": nn.Linear(4, 4), "moving": nn.Linear(4, 4)})
    batch = {"still": torch.full((9, 4), 0.1), "moving": torch.randn(9, 4)}

    def run(model: nn.Module, batch: dict[str, Tensor]) -> None:
        for key, x in batch.items():
            model[key](x)

    sample = Sample([batch], run)  # type: ignore[arg-type]
    handle = lf.attach(model, lf.LoRA(r=2, alpha=4, init="eva"), sample=sample)
    assert list(handle.sites) == ["moving"]
    adapter = model["moving"].adapters["default"]
    assert adapter.A.shape == (4, 4) and adapter.scale == 2.0
    assert not isinstance(model["still"], type(model["moving"]))


def test_without_redistribution_the_method_stays_as_it_was():
    method = lf.LoRA(r=3, init="eva")
    spots = gather(InputDirections(rho=1), two_layers(), method, ("0", "2"), Sample([torch.randn(30, 8)]))
    assert [spot.method for spot in spots.values()] == [method, method]


def test_padding_does_not_count():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)

    class Model(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            self.layer, self.flat = layer, flat

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layer(x.flatten(0, 1) if self.flat else x)

    x, mask = torch.randn(4, 9, 6), torch.rand(4, 9) > 0.4
    garbage = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
    for flat in (False, True):
        batch = {"x": garbage, "attention_mask": mask.long()}
        found = gather(InputDirections(rho=1), Model(flat), lf.LoRA(r=2), ("layer",), Sample([batch]))
        same_directions(found["layer"].evidence, centred_svd(x[mask])[1][:2])
    # A batch that is all padding is no input.
    with pytest.raises(lf.DataError, match="mask or the labels of its batches leave nothing"):
        empty = {"x": x, "attention_mask": torch.zeros(4, 9, dtype=torch.long)}
        gather(InputDirections(), Model(False), lf.LoRA(r=2), ("layer",), Sample([empty]))


def test_convolutions_see_patches():
    conv = nn.Conv2d(2, 8, (2, 3), stride=2, padding=1, dilation=(1, 2))
    x = torch.randn(5, 2, 9, 9)
    found = gather(InputDirections(rho=1), nn.Sequential(conv), lf.LoRA(r=3), ("0",), Sample([x]))
    patches = F.unfold(x, (2, 3), padding=1, stride=2, dilation=(1, 2)).transpose(1, 2).reshape(-1, 12)
    same_directions(found["0"].evidence, centred_svd(patches)[1][:3])
    single = gather(InputDirections(rho=1), nn.Sequential(conv), lf.LoRA(r=3), ("0",), Sample([x[0]]))
    assert single["0"].evidence.shape == (3, 12)


def test_autocast_does_not_reach_the_directions(monkeypatch):
    monkeypatch.setattr(singular, "EXACT", 4)  # the randomised SVD has products that autocast would round

    def run(model: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)

    x = spectrum(9, 7, 5, 3, 2, 1, 1, 1, 1, 1)
    model = nn.Sequential(nn.Linear(10, 8))
    found = gather(InputDirections(rho=1), model, lf.LoRA(r=3), ("0",), Sample([x], run))["0"].evidence
    assert found.dtype == torch.float32
    same_directions(found, centred_svd(x)[1][:3], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_directions_are_in_single_precision_or_better(dtype):
    model, x = nn.Sequential(nn.Linear(8, 8)).to(dtype), spectrum(5, 4, 3, 2, 1, 1, 1, 1).to(dtype)
    found = gather(InputDirections(rho=1), model, lf.LoRA(r=2), ("0",), Sample([x]))["0"].evidence
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same_directions(found, centred_svd(x.double())[1][:2])
    gradient = gather(FirstGradients(), model, lf.LoRA(r=2), ("0",), Sample([x], lambda m, b: m(b).sum()))["0"].evidence
    assert gradient.dtype == found.dtype


def test_a_converged_site_is_left_alone_and_the_sample_is_not_read_to_its_end():
    batch, read = spectrum(8, 4, 1, 0.1, 0.1, 0.1, 0.1, 0.1), []

    def batches() -> Iterator[Tensor]:
        for index in range(10):
            read.append(index)
            yield batch

    gather(InputDirections(rho=1), nn.Sequential(nn.Linear(8, 8)), lf.LoRA(r=2), ("0",), Sample(batches()))
    assert read == [0, 1]  # the second batch confirms the first


def test_eva_is_what_peft_finds():
    peft = pytest.importorskip("peft")
    model = two_layers()
    theirs = copy.deepcopy(model)
    batch = spectrum(8, 5, 4, 2, 1, 0.5, 0.3, 0.2, rows=80)
    spots = gather(InputDirections(), model, lf.LoRA(r=2, alpha=4, init="eva"), ("0", "2"), Sample([batch] * 4))
    options = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], **options)
    state = peft.tuners.lora.eva.get_eva_state_dict(
        theirs,
        [batch] * 4,
        config,
        forward_fn=lambda model, inputs: model(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    assert {path: len(spot.evidence) for path, spot in spots.items()} == {p: len(v) for p, v in state.items() if len(v)}
    for path, spot in spots.items():
        same_directions(spot.evidence, state[path], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- LoRA-GA


def test_first_gradients_are_the_mean_of_autograds_on_every_layer_type(layer):
    model = layer.model()
    batches = [layer.input(seed=seed) for seed in (1, 2, 3)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    found = gather(FirstGradients(), model, lf.LoRA(), ("layer",), Sample(batches, loss))["layer"].evidence
    site = site_class(layer.kind)(model.layer)
    for batch in batches:
        (loss(model, batch) / 3).backward()
    assert found.shape == tuple(site.shape[:2])
    torch.testing.assert_close(site.unfold(found), model.layer.weight.grad, atol=1e-6, rtol=1e-5)


def test_sparse_gradients_count_too():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    found = gather(
        FirstGradients(), model, lf.LoRA(), ("0",), Sample([torch.tensor([1, 3, 3])], lambda m, b: m(b).sum())
    )["0"]
    expected = torch.zeros(4, 9)
    expected[:, 1], expected[:, 3] = 1, 2
    assert torch.equal(found.evidence, expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embed(ids)[:-1]), ids[1:])


def test_a_tied_weight_has_the_gradient_of_each_use():
    model, ids = Tied(), torch.tensor([1, 5, 3, 3, 7])
    spots = gather(FirstGradients(), model, lf.LoRA(), ("embed", "head"), Sample([ids]))
    assert model.head.weight is model.embed.weight
    model(ids).backward()
    whole = spots["embed"].evidence.T + spots["head"].evidence
    torch.testing.assert_close(whole, model.embed.weight.grad)
    assert not spots["embed"].evidence[:, 9].any() and spots["head"].evidence[9].any()  # token 9 is not in the input


def test_gradients_have_no_dropout_in_them():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
    x = torch.randn(8, 6)
    found = gather(FirstGradients(), model, lf.LoRA(), ("1",), Sample([x], lambda m, b: m(b).sum()))["1"]
    torch.testing.assert_close(found.evidence, x.sum(0).expand(4, 6))


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_gradient_or_direction_is_found_without_gradient_mode(init):
    model, x = two_layers(), torch.randn(20, 8)
    with torch.no_grad():
        handle = lf.attach(model, lf.LoRA(r=2, init=init), sample=Sample([x], lambda m, b: m(b).square().sum()))
    assert handle.num_trainable > 0


# -------------------------------------------------------------------------------------------------- left as it was


class Restless(nn.Module):
    """A model with everything that could be left changed: modes, flags, gradients, buffers, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.other = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(1))
        self.fail_at = -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if int(self.calls) == self.fail_at:
            raise RuntimeError("stop")
        x = x + 0.01 * torch.rand_like(x)
        return self.other(self.drop(self.norm(self.layer(x)))).square().sum()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": {path: module.training for path, module in model.named_modules()},
        "flags": {path: p.requires_grad for path, p in model.named_parameters()},
        "grads": {
            path: (id(p.grad), None if p.grad is None else p.grad.tolist()) for path, p in model.named_parameters()
        },
        "ids": {path: id(p) for path, p in model.named_parameters()},
        "buffers": {path: (id(b), b.tolist()) for path, b in model.named_buffers()},
        "values": {path: p.tolist() for path, p in model.named_parameters()},
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "classes": [type(module) for module in model.modules()],
    }


@pytest.mark.parametrize("evidence", [InputDirections(), FirstGradients()], ids=["eva", "lora_ga"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(evidence, failing):
    model = Restless()
    model.norm.eval()
    model.other.weight.requires_grad_(False)
    model(torch.randn(5, 6)).backward()
    model.layer.bias.grad = None
    before = snapshot(model)
    model.fail_at = 3 if failing else -1
    sample = Sample([torch.ones(5, 6) * torch.arange(5.0)[:, None] + torch.eye(5, 6) * k for k in range(1, 4)])
    if failing:
        with pytest.raises(RuntimeError, match="stop"):
            gather(evidence, model, lf.LoRA(r=2), ("layer", "other"), sample)
    else:
        assert gather(evidence, model, lf.LoRA(r=2), ("layer", "other"), sample)
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------- refusals

BOTH = pytest.mark.parametrize("evidence", [InputDirections(), FirstGradients()], ids=["eva", "lora_ga"])


@BOTH
def test_no_batches(evidence):
    with pytest.raises(lf.DataError, match="no batches"):
        gather(evidence, two_layers(), lf.LoRA(r=2), ("0",), Sample(iter([])))


def test_a_mask_that_leaves_nothing_is_said(llama):
    batch = {**tokens(0, padding=0), "attention_mask": torch.zeros(3, 12, dtype=torch.int64)}
    paths = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    with pytest.raises(lf.DataError, match=r"mask or the labels(.|\n)*attention_mask") as error:
        gather(InputDirections(), llama, lf.LoRA(r=2), paths, Sample([batch]))
    assert error.value.where == "Sample.batches"


def test_labels_that_leave_nothing_are_said():
    none = Sample([torch.randn(9, 8)], lambda model, batch: (model(batch) * 0).sum())
    with pytest.raises(lf.DataError, match=r"mask or the labels(.|\n)*labels"):
        gather(FirstGradients(), two_layers(), lf.LoRA(r=2), ("0", "2"), none)
    mean = Sample([torch.randn(9, 8)], lambda m, x: F.cross_entropy(m(x), torch.full((9,), -100)))
    with pytest.raises(lf.DataError, match=r"loss is not finite(.|\n)*-100"):
        gather(FirstGradients(), two_layers(), lf.LoRA(r=2), ("0", "2"), mean)


@BOTH
def test_a_site_that_no_batch_reaches_is_named(evidence):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x).square().sum()

    with pytest.raises(lf.DataError, match="whole sample") as error:
        gather(evidence, Experts(), lf.LoRA(r=2), ("experts.0", "experts.1"), Sample([torch.randn(9, 4)]))
    assert error.value.where == "experts.1" and "exclude" in error.value.fix


@BOTH
def test_numbers_that_are_not_finite(evidence):
    x = torch.randn(9, 8)
    x[3, 2] = math.inf
    with pytest.raises(lf.DataError, match="not finite"):
        gather(evidence, two_layers(), lf.LoRA(r=2), ("0",), Sample([x], lambda m, b: m(b).sum()))


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    with pytest.raises(lf.DataError, match="first gradient") as error:
        gather(
            FirstGradients(), model, lf.LoRA(r=2), ("0",), Sample([torch.randn(3, 4)], lambda m, b: m(b).sqrt().sum())
        )
    assert error.value.where == "0"


def test_what_is_no_loss():
    model, x = two_layers(), torch.randn(9, 8)
    cases: list[tuple[Any, str]] = [
        (None, r"Tensor of shape \(9, 6\)"),
        (lambda m, b: m(b).sum(1), r"Tensor of shape \(9,\)"),
        (lambda m, b: {"loss": m(b).sum()}, "dict"),
        (lambda m, b: 1.0, "float"),
    ]
    for loss, found in cases:
        with pytest.raises(lf.ConfigError, match="no loss") as error:
            gather(FirstGradients(), model, lf.LoRA(r=2), ("0",), Sample([x], loss))
        assert re.search(found, str(error.value.found))
    with pytest.raises(lf.ConfigError, match="depends on none"):
        gather(FirstGradients(), model, lf.LoRA(r=2), ("0",), Sample([x], lambda m, b: m(b).detach().sum()))


class Answering(nn.Module):
    """A model that answers as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        y = self.layer(x)
        return SimpleNamespace(loss=None if labels is None else (y - labels).square().mean(), logits=y)


def test_batches_come_as_mappings_tuples_and_tensors():
    model, x, y = Answering(), torch.randn(5, 4), torch.randn(5, 4)
    results = [
        gather(FirstGradients(), model, lf.LoRA(r=2), ("layer",), Sample([batch]))["layer"].evidence
        for batch in ({"x": x, "labels": y}, (x, y))
    ]
    assert torch.equal(*results)
    with pytest.raises(lf.ConfigError, match="no loss") as error:
        gather(FirstGradients(), model, lf.LoRA(r=2), ("layer",), Sample([x]))
    assert "NoneType" in error.value.found and "labels" in error.value.fix
    # EVA needs no loss.
    assert gather(InputDirections(), model, lf.LoRA(r=2), ("layer",), Sample([x]))


def test_too_little_data_for_the_ranks():
    with pytest.raises(lf.DataError, match="fewer directions") as error:
        gather(InputDirections(), two_layers(), lf.LoRA(r=4), ("0", "2"), Sample([torch.randn(3, 8)]))
    assert error.value.found == "4 directions in 2 layers" and "8" in error.value.expected


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"rho": math.inf}, {"tau": 0.0}, {"tau": 1.5}])
def test_settings_out_of_range(options):
    with pytest.raises(lf.ConfigError, match="out of range"):
        InputDirections(**options)


# ---------------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("wrap", [lf.DoRA, lambda inner: lf.LoRAPlus(inner=inner), lambda inner: lf.LoRADrop(inner)])
def test_methods_around_lora_pass_the_evidence_on(wrap, init):
    model, x = two_layers(), torch.randn(30, 8)
    before = model(x)
    sample = Sample([x], lambda model, batch: model(batch).square().sum())
    handle = lf.attach(model, wrap(lf.LoRA(r=2, alpha=4, init=init)), sample=sample, seed=0)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert sum(p.shape[0] for p in handle.parameters() if p.dim() == 2 and p.shape[1] == 8 and p.shape[0] < 6) == 4


# ------------------------------------------------------------------------------------------------- a language model


@pytest.fixture
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(seed: int, padding: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        mask[1:, -padding:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_language_model_with_padding(llama, init):
    method = lf.LoRA(r=2, alpha=4, init=init)
    batches = [tokens(seed, padding=4) for seed in range(3)]
    before = llama(**batches[0]).logits
    handle = lf.attach(llama, method, sample=Sample(batches), seed=0)
    ranks = [llama.get_submodule(path).adapters["default"].A.shape[0] for path in handle.sites]
    assert sum(ranks) == 2 * 14
    torch.testing.assert_close(llama(**batches[0]).logits, before, atol=1e-5, rtol=1e-4)
    llama(**batches[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_padding_changes_nothing_for_a_language_model(llama):
    """More padding on the right: the same rows count, so the directions are the same."""
    short = tokens(0, padding=0)
    longer = {key: F.pad(value, (0, 5), value=-100 if key == "labels" else 0) for key, value in short.items()}
    paths = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    one, other = (
        gather(InputDirections(rho=1), llama, lf.LoRA(r=3), paths, Sample([batch])) for batch in (short, longer)
    )
    for path in paths:
        same_directions(one[path].evidence, other[path].evidence, atol=1e-4)
