"""Planning: a step on tensors without memory takes what a real step takes, and the machine's facts are read right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafit as lf
from lorafit.errors import ConfigError
from lorafit.training import planning_machine
from lorafit.training.config import resolve
from lorafit.training.planning import Planner, longest_batches
from lorafit.training.planning_advice import advise
from lorafit.training.planning_machine import Rates, parse_memory, rates
from lorafit.training.planning_model import NotTraceableError, skeleton
from lorafit.training.planning_run import course
from lorafit.training.planning_shades import Ledger, Shade, Work, held_bytes, shades
from lorafit.training.prepare import prepare, training_arguments


@pytest.fixture
def settings(model_dir: Path, write: Callable[[str, Any], str]) -> Callable[..., Any]:
    rows = [{"question": f"what is {n} plus one?" * (1 + n % 4), "answer": f"it is {n + 1}"} for n in range(60)]
    path = write("sums.jsonl", rows)

    def make(**changes: Any) -> Any:
        plain = {"model": str(model_dir), "data": path, "eval_split": 8, "r": 4, "packing": False, "dtype": "float32"}
        return resolve([("test", {**plain, **changes})])

    return make


def planner(settings: Any) -> Planner:
    return Planner(settings, lambda line: None)


@pytest.fixture
def wide(make_tokenizer: Callable[..., Any], tmp_path: Path) -> str:
    """A model whose hidden states are large enough to be priced."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, folder = make_tokenizer(), tmp_path / "wide"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


class Real:
    """A real model under the same settings, and what its forward pass keeps."""

    def __init__(self, settings: Any, tmp_path: Path) -> None:
        arguments = training_arguments(settings, tmp_path / "run")
        self.task = prepare(settings, arguments, lambda line: None)
        from lorafit.methods import build

        method = build(settings.method, settings.method_options)
        self.handle = lf.attach(self.task.model, method, settings.targets, seed=0)

    def saved(self, records: list[Any]) -> int:
        """Bytes that autograd keeps, parameters and the batch left out, shared memory once."""
        kept: dict[int, int] = {}
        weights = {one.untyped_storage().data_ptr() for one in self.task.model.parameters()}
        batch = self.task.layout(records)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.is_floating_point():
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.task.model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.task.objective.loss(self.task.model, batch, None)
        loss.backward()
        return sum(kept.values())


@pytest.mark.parametrize("method", ["lora", "lora-fa", "vera", "dora"])
def test_the_formula_is_what_autograd_keeps(settings: Any, tmp_path: Path, method: str) -> None:
    options = {} if method in ("lora", "lora-fa") else {"r": 8}
    chosen = settings(method=method, **options) if method != "dora" else settings(method=method)
    plan = planner(chosen)
    built = plan.model(chosen, plan.data)
    records, _ = longest_batches(built, chosen, plan.data)
    kept = Real(chosen, tmp_path).saved(records)
    peak = built.step(records).peak
    # At its peak a step has beside what is kept the logits of a chunk, or the tensors of a moment.
    logits = 4 * 3 * 128 * len(plan.tokenizer)
    assert kept <= peak <= 1.15 * kept + logits


def test_the_formula_over_int8_is_what_autograd_keeps(settings: Any, tmp_path: Path) -> None:
    chosen = settings(quantise="int8")
    plan = planner(chosen)
    built = plan.model(chosen, plan.data)
    records, _ = longest_batches(built, chosen, plan.data)
    kept = Real(chosen, tmp_path).saved(records)
    # Beside what is kept: a chunk of logits, and the largest weight as it is formed.
    assert kept <= built.step(records).peak <= 1.15 * kept + 4 * 3 * 128 * len(plan.tokenizer) + 2 * 4 * 64 * 32


@pytest.mark.parametrize(("quantise", "wanted"), [("int8", 1.0), ("nf4", 0.5)])
def test_a_quantised_base_is_priced_as_it_is_kept(
    settings: Any, wide: str, quantise: str, wanted: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    plain, packed = (planner(settings(model=wide, quantise=name)) for name in ("none", quantise))
    before, after = (plan.formula(plan.settings, plan.data).sizes for plan in (plain, packed))
    layer = 4 * 128 * 128 + 3 * 128 * 384
    saved = before.base - after.base
    assert saved == pytest.approx((4 - wanted) * 4 * layer, rel=0.03)
    assert after.adapter == before.adapter
    # int8 rows are read one by one; NF4 is made of the plain weights.
    assert after.loading == (0 if quantise == "int8" else pytest.approx(before.base, rel=0.01))
    if quantise == "int8":
        model = Real(packed.settings, tmp_path).task.model
        held = [*(one for one in model.parameters() if not one.requires_grad), *model.buffers()]
        real = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}
        assert after.base == pytest.approx(sum(real.values()), rel=0.1)


def test_loading_counts_where_it_is_the_most(settings: Any, wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = {"model": wide, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "recompute": "blocks"}
    plan = planner(settings(**options, quantise="nf4", max_length=60))
    forecast = plan.forecast(dry=True, limit=None, notify=lambda line: None)
    formula = forecast.formula
    assert formula.loading > 0 and forecast.parts[-1].name == "plain weights, to begin with"
    assert formula.peak == sum(part.formula for part in forecast.parts) == formula.process + formula.sizes.loading


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa"])
def test_recompute_cheap_is_priced_as_it_runs(settings: Any, wide: str, method: str) -> None:
    peaks = {}
    for recompute in ("none", "cheap", "blocks"):
        plan = planner(settings(model=wide, recompute=recompute, method=method))
        built = plan.model(plan.settings, plan.data)
        records, _ = longest_batches(built, plan.settings, plan.data)
        peaks[recompute] = built.step(records).peak
    share = 0.9 if method == "lora-fa" else 0.85  # which keeps fewer of them in the first place
    assert peaks["blocks"] < peaks["cheap"] < share * peaks["none"]


def test_cheap_places_are_those_of_the_run(settings: Any, wide: str, tmp_path: Path) -> None:
    from lorafit.training.recompute_cheap import find_places

    chosen = settings(model=wide, recompute="cheap")
    plan, real = planner(chosen), Real(chosen, tmp_path)
    built = plan.model(chosen, plan.data)
    batch = built.layout(plan.data.train[:2])
    ours, theirs = (
        find_places(model, lambda: objective.loss(model, batch, None))  # noqa: B023 (run at once)
        for model, objective in ((built.model, built.objective), (real.task.model, real.task.objective))
    )
    names = [{id(part): name for name, part in model.named_modules()} for model in (built.model, real.task.model)]
    assert len(theirs.modules) == 13 and len(theirs.products) == 4
    for place, other in zip(ours.modules, theirs.modules, strict=True):
        assert names[0][id(place)] == names[1][id(other)]
    for one, two in zip(ours.products, theirs.products, strict=True):
        assert [names[0][id(part)] for part in one] == [names[1][id(part)] for part in two]


def test_shades_know_what_they_were_made_of() -> None:
    with Ledger():
        one, other = torch.zeros(200, 200), torch.ones(200, 200)
        assert torch.equal(one * other, other * one) and torch.equal(one, one.detach())
        assert not torch.equal(one, other) and not torch.equal(one * 2, one * 3)
        assert torch.equal(torch.nn.functional.silu(one), torch.nn.functional.silu(one))
        assert not torch.equal(torch.rand_like(one), torch.rand_like(one))
        before = one * 1.0
        before.add_(1)
        assert not torch.equal(before, one * 1.0)
        first, second = one.split(100)
        assert not torch.equal(first, second) and torch.equal(first, one.split(100)[0])


def test_dropping_x_shows_in_the_formula(settings: Any) -> None:
    plain, frozen = (planner(settings(method=name)) for name in ("lora", "lora-fa"))
    full, less = (plan.formula(plan.settings, plan.data) for plan in (plain, frozen))
    assert less.step.peak < full.step.peak and less.sizes.gradients < full.sizes.gradients
    assert full.sizes.optimizer == pytest.approx(2 * full.sizes.gradients, rel=0.01)  # AdamW's two moments


def test_sizes_are_those_of_the_model(settings: Any, tmp_path: Path) -> None:
    chosen = settings()
    plan = planner(chosen)
    sizes = plan.model(chosen, plan.data).sizes
    real = Real(chosen, tmp_path)
    trained = sum(one.numel() for one in real.handle.parameters())
    assert sizes.adapter == sizes.gradients == 4 * trained
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in real.task.model.parameters()}
    assert sizes.base == pytest.approx(sum(held.values()) - sizes.adapter, rel=0.01)  # and tables of angles


def test_checkpoints_take_less_memory_and_more_work(settings: Any) -> None:
    machine = Rates(1e11, 1e10, 1e-6)
    prices = []
    for recompute in ("none", "blocks"):
        plan = planner(settings(recompute=recompute, num_train_epochs=1))
        built = plan.model(plan.settings, plan.data)
        prices.append(built.step(longest_batches(built, plan.settings, plan.data)[0]))
    kept, again = prices
    assert again.peak < kept.peak and again.seconds(machine) > kept.seconds(machine)
    assert sum(work.flops * count for work, count in again.work.items()) > sum(
        work.flops * count for work, count in kept.work.items()
    )


def test_nothing_is_read_of_the_weights(settings: Any, model_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    plan = planner(settings(model=str(bare)))
    assert plan.forecast(dry=True, limit=None, notify=lambda line: None).fits


def test_a_huge_model_takes_no_memory(settings: Any, model_dir: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (huge / file.name).write_bytes(file.read_bytes())
    config = json.loads((huge / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8, "head_dim": None}
    (huge / "config.json").write_text(json.dumps(config))
    plan = planner(settings(model=str(huge)))
    formula = plan.formula(plan.settings, plan.data)
    # q and o are square here, k and v half as wide (2 of 4 heads), and there are three matrices of the MLP.
    layer = 8192 * 8192 * 3 + 3 * 8192 * 28672
    assert formula.sizes.base == pytest.approx(4 * 8 * layer, rel=0.05)


def test_the_course_counts_batches_and_evaluations(settings: Any) -> None:
    def of(**changes: Any) -> Any:
        chosen = settings(**changes)
        arguments = training_arguments(chosen, Path("unused"))
        plan = planner(chosen)
        return course(chosen, arguments, plan.data.train, plan.data.eval, 2, lambda batch: max(map(len, batch)))

    epoch = of()
    assert (epoch.steps, epoch.micro_batches, epoch.evaluations) == (7, 7, 2)  # 52 records; before, and at the end
    assert of(gradient_accumulation_steps=2, max_steps=3).micro_batches == 6
    assert of(eval_strategy="steps", eval_steps=2, max_steps=5).evaluations == 4  # before, 2, 4, after
    assert of(eval_strategy="no").evaluations == 2
    assert of(eval_split=0).evaluations == 0
    longest = of().longest
    assert max(map(len, longest)) == max(len(one) for one in planner(settings()).data.train)


def test_a_step_of_no_memory_computes_shapes_and_costs() -> None:
    layer = nn.Linear(64, 512, device="meta")
    shades(layer)
    ledger = Ledger()
    ledger.known(layer.weight)
    ledger.known(layer.bias)
    with ledger:
        y = layer(torch.ones(1000, 64))
        assert isinstance(y, Shade) and y.shape == (1000, 512) and ledger.live == 4 * (1000 * 512 + 1000 * 64)
        del y
        torch.zeros(2, 3)  # small ones are real
    assert ledger.peak == 4 * (1000 * 512 + 1000 * 64)
    assert any(work.flops == 2 * 1000 * 64 * 512 for work in ledger.work)
    assert held_bytes([layer.weight, layer.weight, layer.bias]) == 4 * (64 * 512 + 512)


def test_attention_on_shades_is_the_kind_that_a_cpu_has() -> None:
    query = torch.zeros(2, 4, 256, 16)
    with Ledger() as ledger:
        large = torch.zeros(2, 4, 256, 16)
        F.scaled_dot_product_attention(large, large, large)
    assert query.shape == large.shape
    assert ledger.peak < 4 * 2 * 4 * 256 * 256  # a matrix of scores is never there


def test_a_model_that_looks_at_values_says_so(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(settings())
    built = plan.model(plan.settings, plan.data)
    records, _ = longest_batches(built, plan.settings, plan.data)
    hook = built.model.model.layers[0].register_forward_hook(lambda module, args, output: output[output > 0])
    with pytest.raises(NotTraceableError, match="without its weights"):
        built.step(records)
    hook.remove()


def test_advice_begins_with_what_changes_nothing(settings: Any) -> None:
    plan = planner(settings(per_device_train_batch_size=4, eval_split=2))
    forecast = plan.forecast(dry=True, limit=1, notify=lambda line: None)
    assert not forecast.fits
    advice = advise(plan, forecast)
    kinds = [one.change.split()[0] for one in advice]
    assert advice and not any(one.enough for one in advice)
    assert all(one.peak < forecast.peak for one in advice)
    order = ["--per-device-eval-batch-size", "--per-device-train-batch-size", "--recompute", "--method", "--dtype"]
    ranks = [order.index(kind) for kind in kinds if kind in order and kind != "--per-device-train-batch-size"]
    assert ranks == sorted(ranks)


def test_advice_names_a_quantised_base(settings: Any, wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(settings(model=wide, per_device_train_batch_size=4, eval_split=2))
    advice = advise(plan, plan.forecast(dry=True, limit=1, notify=lambda line: None))
    named = {one.change: one for one in advice}
    assert "--recompute cheap" in named and "--quantise int8" in named
    assert named["--quantise int8"].peak < plan.forecast(dry=True, limit=1, notify=lambda line: None).peak
    together = next(one for change, one in named.items() if change.endswith("--recompute blocks --quantise int8"))
    assert together.peak == min(one.peak for one in advice)
    kept = planner(settings(model=wide, quantise="int8", recompute="cheap"))
    again = advise(kept, kept.forecast(dry=True, limit=1, notify=lambda line: None))
    assert not any("int8" in one.change or "cheap" in one.change for one in again)


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"packing": "auto"}, "packing: "),
        ({"packing": "auto", "include_num_input_tokens_seen": "non_padding"}, ""),
        ({"packing": False}, ""),
    ],
)
def test_packing_is_decided_as_in_the_run(settings: Any, tmp_path: Path, changes: dict[str, Any], begins: str) -> None:
    chosen = settings(**changes)
    plan = planner(chosen)
    built = plan.model(chosen, plan.data)
    said: list[str] = []
    task = prepare(chosen, training_arguments(chosen, tmp_path / "run"), said.append)
    assert type(built.layout) is type(task.layout)
    assert built.told.startswith(begins) and bool(built.told) == bool(begins)
    assert any(line.startswith("packing") for line in said) == bool(begins) and (not begins or built.told in said)
    records, _ = longest_batches(built, chosen, plan.data)
    assert built.places(records) == task.layout(records)["input_ids"].numel()


def test_what_a_run_refuses_a_plan_refuses(settings: Any) -> None:
    chosen = settings(packing=True, include_num_input_tokens_seen="non_padding")
    with pytest.raises(ConfigError, match="packed rows"):
        planner(chosen).forecast(dry=True, limit=None, notify=lambda line: None)


def test_what_the_measured_run_found_of_packing_counts(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.training import planning
    from lorafit.training.planning_child import Measured

    told = "padding: no packing with this model (an attention mask for each row: records see their neighbours)"
    found = Measured(10**9, (0.1, 0.1, 0.1), None, 8, 0.0, 1.0, told)
    monkeypatch.setattr(planning, "measure", lambda settings: found)
    plan = planner(settings(packing="auto"))
    dry, measured = (plan.forecast(dry=dry, limit=None, notify=lambda line: None) for dry in (True, False))
    assert dry.layout.startswith("packing: ") and measured.layout == told
    assert measured.formula.step.tokens > dry.formula.step.tokens and measured.course.tokens > dry.course.tokens


def test_what_a_run_watches_takes_time(settings: Any, write: Callable[[str, Any], str], monkeypatch: Any) -> None:
    from lorafit.training import planning
    from lorafit.training.planning_child import Measured

    target = write("target.jsonl", [{"question": f"turn w{n}ord", "answer": f"dro{n}w" * 600} for n in range(40)])
    watching = settings(target=target, max_length=4096)
    # A quarter of a second for a tenth of the tokens, before training and after.
    plan = planner(watching)
    tokens = sum(len(one) for part in plan.watched.parts() for one in part.records)
    found = Measured(10**9, (0.1, 0.1, 0.1), None, 8, 0.0, 1.0, "", 0.25, tokens // 10)
    monkeypatch.setattr(planning, "measure", lambda settings: found)
    forecast = plan.forecast(dry=False, limit=None, notify=lambda line: None)
    assert forecast.watching == "general text and target.jsonl" and forecast.measured_times is not None
    assert forecast.measured_times.watched == pytest.approx(5, rel=0.2)  # more by what batches are padded with
    assert 0 < forecast.times.watched < forecast.times.total
    without = planner(settings(general="none", max_length=4096)).forecast(
        dry=True, limit=None, notify=lambda line: None
    )
    assert without.times.watched == 0 and without.watching == ""
    assert forecast.formula.activations > without.formula.activations  # the longest batch is one of the target


def test_what_the_steps_of_a_plan_say_of_the_general_text(settings: Any) -> None:
    from lorafit.training.planning_child import measure

    with_text, without = measure(settings()), measure(settings(general="none"))
    assert not isinstance(with_text, str) and not isinstance(without, str)
    assert with_text.watched > 0 and with_text.watched_tokens > 1000
    assert (without.watched, without.watched_tokens) == (0.0, 0)


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("2 GiB", 2**31), ("512mb", 512 * 10**6)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "0GB", "8 G", "1e3GB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_memory(text)


def test_a_container_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, used, info = tmp_path / "max", tmp_path / "current", tmp_path / "meminfo"
    info.write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(planning_machine, "_MEMINFO", info)
    monkeypatch.setattr(planning_machine, "_GROUPS", ((most, used),))
    monkeypatch.setattr(planning_machine, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(planning_machine.sys, "platform", "linux")
    cpu = torch.device("cpu")
    assert planning_machine.limit_of(cpu).size == 8000 * 1024
    most.write_text("max\n")
    used.write_text("1000\n")
    assert planning_machine.limit_of(cpu).size == 8000 * 1024
    most.write_text("5000000\n")
    assert planning_machine.limit_of(cpu).size == 4999000


def test_rates_price_the_slower_of_computing_and_moving() -> None:
    machine = Rates(flops=100.0, moved=10.0, call=1.0)
    assert machine.seconds({Work(1000, 10): 1, Work(0, 50): 2}) == pytest.approx(11 + 2 * 6)
    measured = rates(torch.device("cpu"), torch.float32, 64, 64)
    assert measured.flops > 1e6 and measured.moved > 1e6 and 0 < measured.call < 0.1


def test_skeleton_of_a_model_that_is_not_there(settings: Any, tmp_path: Path) -> None:
    from lorafit.training.models import Located

    chosen = settings()
    plan = planner(chosen)
    with pytest.raises(ConfigError, match="config cannot be read"):
        skeleton(chosen, plan.arguments, Located(str(tmp_path), "none"), plan.data, 0, torch.float32)
