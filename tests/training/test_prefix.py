"""Layers below all that is trained: no backward pass there, and one forward pass for each record."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorafit as lf
from lorafit.errors import ConfigError
from lorafit.training import prefix
from lorafit.training.batches import Collator, LabelCollator
from lorafit.training.classify import EncodedLabel
from lorafit.training.config import resolve
from lorafit.training.loss import SupervisedLoss
from lorafit.training.objectives import Classes
from lorafit.training.outcome import Outcome
from lorafit.training.packing import Layout, Limits, Masked, PackingCollator, Restarted
from lorafit.training.prefix_layers import find_stack
from lorafit.training.prefix_pieces import pieces
from lorafit.training.prefix_store import INDEX, STATES, PrefixStore
from lorafit.training.prefix_trial import NotConstantError, Subject, attempt
from lorafit.training.run import train
from lorafit.training.sequences import Encoded

UPPER = r".*layers\.[23]\..*_proj"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def deep_dir(make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers."""
    folder = tmp_path_factory.mktemp("deep")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}, **special)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(deep_dir: Path, write: Callable[[str, Any], str], tmp_path: Path, said: list[str]) -> Run:
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}" + "!" * (n % 5)} for n in range(40)]
    settings = {
        "model": str(deep_dir),
        "data": write("sums.jsonl", rows),
        "eval_split": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "r": 4,
        "targets": UPPER,
        "save_steps": 5,
        "samples": 0,
        "use_cpu": True,
    }

    def run(folder: str = "run", **changes: Any) -> Outcome:
        resolved = resolve([("test", {**settings, "output_dir": str(tmp_path / folder), **changes})])
        return train(resolved, command="test", notify=said.append, console=Console(quiet=True))

    return run


def recorded(outcome: Outcome, event: str, key: str) -> list[Any]:
    lines = (outcome.folder.path / "records.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if record["event"] == event]


def weights(outcome: Outcome) -> bytes:
    return (outcome.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How often each layer runs while the fixture is there."""
    counts: collections.Counter[str] = collections.Counter()
    plain = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.self_attn.layer_idx] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", forward)
    yield counts


# Runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1},
        {"gradient_accumulation_steps": 2},
        {"recompute": "blocks"},
        {"method": "dora"},
        {"method": "lora-drop", "rest": "freeze", "threshold": 0.3, "per_kind": False, "targets": "all-linear"},
        {"packing": True},
        {"bf16": True},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_the_losses_are_the_same_bit_for_bit(run: Run, said: list[str], changes: dict[str, Any]) -> None:
    changes = {"packing": False, **changes}
    computed, cached = run("a", prefix_cache=False, **changes), run("b", prefix_cache=True, **changes)
    if changes.get("method") != "lora-drop":  # whose choice need not leave out the lowest layers
        assert any("computed in the first pass" in line for line in said), [line for line in said if "layers" in line]
    exact = not changes["packing"]
    for event in ("step", "evaluation"):
        first, second = (recorded(one, event, "loss") for one in (computed, cached))
        assert len(first) > 3 and (first == second if exact else first == pytest.approx(second, rel=1e-5))
    assert not exact or weights(computed) == weights(cached)
    assert not (cached.folder.path / prefix.FOLDER).exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_that_are_compiled_are_run_once_too(run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    counts: list[tuple[int, int]] = []
    close = prefix.Cached.close

    def counted(self: prefix.Cached) -> None:
        counts.append((self.read, self.passes))
        close(self)

    monkeypatch.setattr(prefix.Cached, "close", counted)
    changes = {"packing": False, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    plain = run("a", prefix_cache=False, **changes)
    compiled = run("b", prefix_cache=True, compile=True, **changes)
    torch.compiler.reset()
    assert any("computed in the first pass" in line for line in said), said
    for event in ("step", "evaluation"):
        first, second = (recorded(one, event, "loss") for one in (plain, compiled))
        assert len(first) >= 3 and first == pytest.approx(second, rel=1e-3)
    ((read, passes),) = counts
    assert passes > read > passes / 2  # what was computed in the first epoch is there in the second


def test_lower_layers_run_once_for_each_record(run: Run, counted: collections.Counter[int], said: list[str]) -> None:
    run("a", packing=False, prefix_cache=False)
    plain = dict(counted)
    counted.clear()
    run("b", packing=False)
    # Three epochs of four batches and four evaluations of one are 16 passes; now 5, and 4 of the trial before them.
    assert plain[0] - counted[0] == plain[1] - counted[1] == 16 - 5 - 4
    assert counted[2] - plain[2] == counted[3] - plain[3] == 3  # of the trial one ends below
    assert any("layers 0 to 1 of 4 are not trained" in line for line in said)


def test_auto_is_for_runs_that_gain_by_it(run: Run, said: list[str]) -> None:
    run("a", num_train_epochs=1)
    run("b", targets="all-linear", max_steps=10)
    assert not any("layers 0 to" in line for line in said)
    run("c", targets="all-linear", max_steps=10, prefix_cache=True)
    assert any("prefix_cache has no effect" in line for line in said)


def test_a_run_that_is_killed_goes_on_with_what_it_had(
    run: Run, counted: collections.Counter[int], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", packing=False)

    class KilledError(BaseException):
        pass

    from lorafit.training.trainer import AdapterTrainer

    original, left = AdapterTrainer.compute_loss, itertools.count()

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(left) == 7:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", dies)
    with pytest.raises(KilledError):
        run("killed", packing=False)
    monkeypatch.setattr(AdapterTrainer, "compute_loss", original)
    counted.clear()
    resumed = run("killed", packing=False)
    assert resumed.resumed_from == 5
    tried = counted[2] - 7 - 2  # all but the steps and evaluations that were left
    assert recorded(whole, "step", "loss")[-7:] == recorded(resumed, "step", "loss")[-7:]
    assert weights(whole) == weights(resumed)
    assert any("records are there" in line for line in said)
    assert counted[0] <= tried + 2  # nothing is computed a second time


def test_other_weights_make_the_cache_worthless(run: Run, deep_dir: Path, tmp_path: Path, said: list[str]) -> None:
    def key(change: Callable[[Any], None]) -> str:
        model = transformers.AutoModelForCausalLM.from_pretrained(deep_dir)
        lf.attach(model, lf.LoRA(r=2), UPPER)
        change(model)
        stack = find_stack(model)
        assert stack is not None
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        about = prefix.Run(True, model, arguments, 2.0, [], [], lambda _: torch.zeros(()), lambda _: {}, tmp_path)
        return prefix._key(about, stack, prefix.Form(32, torch.float32, tupled=False))

    def lower(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 1e-3

    def upper(model: Any) -> None:
        model.model.layers[3].mlp.up_proj.weight.data[3, 5] += 1e-3

    def adapter(model: Any) -> None:
        model.model.layers[3].mlp.up_proj.adapters["default"].A.data += 1

    same = key(lambda model: None)
    assert same == key(upper) == key(adapter) != key(lower)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, "adds noise"),
        ({"modules_to_save": ["embed_tokens"]}, "something below them is trained"),
    ],
)
def test_why_not_is_said(run: Run, said: list[str], changes: dict[str, Any], reason: str) -> None:
    assert run(**changes).status == "done"
    assert any("computed in every pass all the same" in line and reason in line for line in said)


def test_a_disk_that_is_too_small(run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda _: usage)
    assert run().status == "done"
    assert any("more than half of the" in line for line in said)


def test_a_cache_larger_than_auto_takes(run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "MOST", 1000)
    run("a")
    assert any("--prefix-cache does it all the same" in line for line in said)
    run("b", prefix_cache=True)
    assert any("computed in the first pass" in line for line in said)


def test_a_disk_that_fills_up_does_not_end_the_run(run: Run, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("a", packing=False)
    original, left = PrefixStore.write, itertools.count()

    def full(self: PrefixStore, *args: Any) -> None:
        if next(left) == 20:
            raise OSError("No space left on device")
        original(self, *args)

    monkeypatch.setattr(PrefixStore, "write", full)
    outcome = run("b", packing=False)
    assert outcome.status == "done" and weights(outcome) == weights(expected)
    assert any("computed from here on: No space left" in line for line in said)


# Models -----------------------------------------------------------------------


def record(length: int) -> Encoded:
    ids = torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Encoded(ids, [-100] * (length // 2) + ids[length // 2 :], "")


RECORDS = [record(length) for length in (9, 5, 7, 12, 30)]
SMALL_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
CALM = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = transformers.LlamaConfig
FITS = {
    "llama": LLAMA(**SIZES),
    "qwen2, sliding": transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "gpt2 without dropout": transformers.GPT2Config(**SMALL_GPT, **CALM),
}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
DOES_NOT = {
    "dropout": (LLAMA(**SIZES, attention_dropout=0.1), "dropout"),
    "dropout at the embeddings": (transformers.GPT2Config(**SMALL_GPT, **{**CALM, "embd_pdrop": 0.1}), "dropout"),
    "padding counts": (
        LLAMA(**SIZES, max_position_embeddings=16, rope_parameters=ROPE),
        "beside it, or on its padding",
    ),
    "router's loss": (
        transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
        "needs more",
    ),
    "more than states": (
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
        "return more than their states",
    ),
}


def subject(config: Any, collator: Any = None) -> Subject:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    loss = SupervisedLoss.prepare(model)
    handle = lf.attach(model, lf.LoRA(r=2, dropout=0.1), exclude=r".*\.[01]\..*|.*head.*")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    stack = find_stack(model)
    assert stack is not None and stack.first == 2 and stack.share == 0.5
    batch = collator or Collator(0)
    return Subject(model, stack, lambda batch: loss(model, batch), batch, torch.device("cpu"))


@pytest.mark.parametrize("name", FITS)
def test_models_that_it_works_with_and_that_are_left_as_they_were(name: str) -> None:
    one = subject(FITS[name])
    one.model.eval()
    modules, state = list(one.model.modules()), torch.get_rng_state()
    form = attempt(one, RECORDS)
    assert (form.width, form.dtype) == (32, torch.float32)
    assert list(one.model.modules()) == modules and not any(module.training for module in modules)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in one.model.parameters())


@pytest.mark.parametrize("name", DOES_NOT)
def test_models_that_it_does_not_work_with(name: str) -> None:
    config, reason = DOES_NOT[name]
    one = subject(config)
    modules = list(one.model.modules())
    with pytest.raises(NotConstantError, match=reason):
        attempt(one, RECORDS)
    assert list(one.model.modules()) == modules


class Mixing(nn.Module):
    """A layer whose output for a record depends on the others of the batch."""

    def forward(self, states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return states - states.mean(0, keepdim=True)


def test_records_that_see_one_another() -> None:
    one = subject(FITS["llama"])
    one.stack.layers[0] = Mixing()
    with pytest.raises(NotConstantError, match="records beside it"):
        attempt(one, RECORDS)


def test_a_classifier_needs_its_last_token() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(LLAMA(**SIZES, pad_token_id=0, num_labels=3))
    lf.attach(model, lf.LoRA(r=2), UPPER, modules_to_save=["score"])
    stack = find_stack(model)
    assert stack is not None
    records = [EncodedLabel(one.input_ids, None, 1, "") for one in RECORDS]
    collator = LabelCollator(0)
    one = Subject(model, stack, lambda batch: Classes().loss(model, batch, None), collator, torch.device("cpu"))
    attempt(one, records)
    found = pieces(collator(records))
    assert found is not None and [piece.end for piece in found] == [9, 5, 7, 12, 30]


def test_models_without_layers_to_spare() -> None:
    assert find_stack(nn.Sequential(nn.Linear(2, 2))) is None
    model = transformers.LlamaForCausalLM(LLAMA(**SIZES))
    lf.attach(model, lf.LoRA(r=2))
    stack = find_stack(model)
    assert stack is not None and stack.first == 0


# Sequences in batches ---------------------------------------------------------


def test_a_record_is_the_same_sequence_in_every_layout() -> None:
    beginning = list(range(40, 46))
    made = []
    for one in RECORDS[:4]:
        made.append(Encoded([*beginning, *one.input_ids], [-100] * 6 + one.labels, ""))
    # The tail of the last record teaches nothing: it is not needed either.
    made.append(Encoded([*made[0].input_ids, 3, 4], [*made[0].labels, -100, -100], ""))
    plain = pieces(Collator(0)(made))
    assert plain is not None and [piece.end for piece in plain] == [14, 10, 12, 17, 14]
    digests = [piece.digest for piece in plain]
    assert digests[4] == digests[0] and len(set(digests)) == 4
    for isolation, shared in ((Masked(torch.float32), 6), (Masked(torch.float32), 0), (Restarted(one_row=False), 0)):
        collator = PackingCollator(Collator(0), isolation, Limits())
        rows = ((0, 2), (3, 4, 1))
        width = max(shared + sum(len(made[n]) - shared for n in row) for row in rows)
        packed = pieces(collator.packed(made, Layout(shared, rows, width)))
        assert packed is not None
        assert sorted(piece.digest for piece in packed) == sorted(digests)
        states = torch.arange(2 * width * 3.0).reshape(2, width, 3)
        for piece in packed:
            values = piece.read(states)
            assert len(values) == plain[digests.index(piece.digest)].end
            other = torch.zeros_like(states)
            piece.write(other, values)
            assert torch.equal(piece.read(other), values)


def test_batches_of_another_form() -> None:
    batch = Collator(0)(RECORDS)
    assert pieces({**batch, "pixels": torch.zeros(1)}) is None
    assert pieces({**batch, "attention_mask": batch["attention_mask"].flip(1)}) is None
    assert pieces({**batch, "attention_mask": torch.ones(5, 1, 30, 30)}) is None
    assert pieces({**batch, "position_ids": batch["input_ids"]}) is None
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert pieces(nothing) == []


# The file ---------------------------------------------------------------------


def store(folder: Path, key: str = "key", dtype: torch.dtype = torch.bfloat16) -> PrefixStore:
    return PrefixStore(folder, key, 4, dtype)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one, states = store(tmp_path / "x"), {f"d{n}": torch.randn(n, 4).bfloat16() for n in (3, 1, 5)}
    for digest, values in states.items():
        one.write(digest, values)
    assert len(one) == 3 and one.bytes == 9 * 4 * 2 and "d3" in one and "d2" not in one
    one.commit()
    one.write("later", torch.ones(2, 4))
    one.close()
    again = store(tmp_path / "x")
    assert len(again) == 3 and "later" not in again
    assert all(torch.equal(again.read(digest), values) for digest, values in states.items())
    again.write("other", torch.full((7, 4), 2.0))
    assert torch.equal(again.read("other"), torch.full((7, 4), 2.0).bfloat16())
    assert torch.equal(again.read("d5"), states["d5"])
    again.remove()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["key", "short", "index", "entries", "none"])
def test_what_is_not_whole_or_of_another_key_is_not_read(tmp_path: Path, damage: str) -> None:
    one = store(tmp_path)
    one.write("d", torch.ones(2, 4))
    one.commit()
    one.close()
    if damage == "short":
        (tmp_path / STATES).write_bytes(b"12345")
    elif damage == "index":
        (tmp_path / INDEX).write_text('{"key":')
    elif damage == "entries":
        index = json.loads((tmp_path / INDEX).read_text())
        (tmp_path / INDEX).write_text(json.dumps({**index, "entries": {"d": [0, 99]}}))
    again = store(tmp_path, "another" if damage == "key" else "key")
    assert len(again) == (1 if damage == "none" else 0)
    again.close()


# The backward pass ------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products. (torch's own counter hooks modules, which calls of
    `torch.autograd.grad` inside of a forward do not survive.)"""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.count += result.numel() * args[-1].shape[0]
        return result


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "gradient checkpointing"])
def test_no_backward_pass_below_the_lowest_adapter(run: Run, monkeypatch: pytest.MonkeyPatch, blocks: bool) -> None:
    seen: dict[int, bool] = {}

    def watch(targets: str, folder: str) -> float:
        from lorafit.training.trainer import AdapterTrainer

        original = AdapterTrainer.training_step
        flops: list[float] = []

        def step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            hooks = [
                layer.register_forward_hook(
                    lambda module, args, output: seen.update({module.self_attn.layer_idx: output.requires_grad})
                )
                for layer in model.model.layers
            ]
            with Products() as counter:
                result = original(self, model, *args, **kwargs)
            for hook in hooks:
                hook.remove()
            flops.append(counter.count)
            return result

        monkeypatch.setattr(AdapterTrainer, "training_step", step)
        run(folder, max_steps=1, targets=targets, gradient_checkpointing=blocks, packing=False, eval_strategy="no")
        monkeypatch.setattr(AdapterTrainer, "training_step", original)
        return flops[0]

    upper, everywhere = watch(UPPER, "a"), watch("all-linear", "b")
    assert seen == dict.fromkeys(range(4), True)
    upper = watch(UPPER, "c")
    assert seen == {0: False, 1: False, 2: True, 3: True}
    # A forward pass is 1 a layer, the input's gradient 1, its recomputation 1: 6 or 8 for 4 layers, and 8 or 12.
    assert upper / everywhere < (0.72 if blocks else 0.80)


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_reentrant_checkpoints_are_refused(run: Run, name: str) -> None:
    switch = name.removesuffix("_kwargs")
    with pytest.raises(ConfigError, match="reentrant"):
        run(**{switch: True, name: {"use_reentrant": True}})
    with pytest.raises(ConfigError, match="reentrant"):
        run(**{switch: True, name: '{"use_reentrant": true}'})
    assert run(**{switch: True, name: {"preserve_rng_state": False}}, max_steps=1).status == "done"


def test_a_file_that_lost_its_end_ends_the_cache_and_not_the_run(tmp_path: Path) -> None:
    kept = store(tmp_path / "p")
    kept.write("a", torch.ones(2, 4))
    kept.commit()
    (tmp_path / "p" / "states.bin").write_bytes(b"")
    with pytest.raises(EOFError, match=r"states\.bin ends before byte"):
        kept.read("a")
    kept.close()


def test_an_index_never_speaks_of_states_that_were_written_over(tmp_path: Path) -> None:
    first = store(tmp_path / "p", "one")
    first.write("a", torch.ones(2, 4))
    first.write("b", 2 * torch.ones(2, 4))
    first.commit()
    first.close()
    other = store(tmp_path / "p", "two")  # another base model
    other.write("b", 20 * torch.ones(2, 4))
    other.write("a", 10 * torch.ones(2, 4))
    other.close()  # killed before it was committed
    again = store(tmp_path / "p", "one")
    assert len(again) == 0
    again.close()
