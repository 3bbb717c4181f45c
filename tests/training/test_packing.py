"""Records that share rows: the loss of every token, and every gradient, as in rows of their own; else a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import lorafit as lf
from lorafit.cli.settings import gather
from lorafit.errors import ConfigError
from lorafit.training import packing_trial
from lorafit.training.batches import TOKENS, Collator
from lorafit.training.config import resolve
from lorafit.training.loss import SupervisedLoss
from lorafit.training.outcome import Outcome
from lorafit.training.packing import (
    Limits,
    Masked,
    PackingCollator,
    Restarted,
    best_layout,
    shared_beginning,
)
from lorafit.training.packing_trial import Decision, decide
from lorafit.training.run import train
from lorafit.training.sequences import IGNORED, Encoded

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-eager": lambda: LlamaConfig(**SIZES, attn_implementation="eager"),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0),
    "gpt2": lambda: GPT2Config(**GPT2, **NO_DROPOUT),
    "moe": lambda: MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gpt-neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
BY_POSITIONS = ("mistral-window", "qwen2-window", "gpt-neo")
"""Records longer than an attention window: a mask made here does not know it, the model's own does."""
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "mpt": lambda: MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3
    ),
    "moe-router": lambda: MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).train()


def make_records(count: int = 16, *, seed: int = 0, beginning: int = 4, longest: int = 9) -> list[Encoded]:
    """Records that begin alike and learn their last tokens, one of them also one in between."""
    draw = random.Random(seed)
    same = [draw.randrange(3, VOCABULARY) for _ in range(beginning)]
    records = []
    for number in range(count):
        own = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(4, longest))]
        learnt = draw.randint(1, len(own) - 2)
        ids = same + own
        labels = [IGNORED] * (len(ids) - learnt) + ids[len(ids) - learnt :]
        if number % 4 == 1:
            labels[beginning + 1] = ids[beginning + 1]
        records.append(Encoded(ids, labels, f"record {number}"))
    return records


def decided(model: PreTrainedModel, records: Sequence[Encoded], wanted: Any = True, batch_size: int = 6) -> Decision:
    loss = SupervisedLoss.prepare(model)
    return decide(wanted, model, loss, records, Collator(0), batch_size=batch_size, seed=0)


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of all learnt tokens, row by row."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", TOKENS)}
    scores = torch.log_softmax(model(**inputs, use_cache=False).logits[:, :-1].double(), dim=-1)
    wanted = batch["labels"][:, 1:]
    return -scores.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2)[wanted != IGNORED]


def gradients(handle: lf.Handle, loss: Tensor) -> list[Tensor]:
    for parameter in handle.parameters():
        parameter.grad = None
    loss.backward()
    return [parameter.grad.clone() for parameter in handle.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_gradients_are_those_of_rows_of_their_own(kind: str) -> None:
    # In double precision what is left is no rounding (the kernel for experts has none, and softmax is made in single).
    model = build(CONFIGS[kind](), dtype=torch.float32 if kind == "moe" else torch.float64)
    near = {"rtol": 2e-3, "atol": 1e-4} if kind == "moe" else {"rtol": 1e-4, "atol": 1e-6}
    records = make_records()
    decision = decided(model, records)
    collator = decision.collator
    assert isinstance(collator, PackingCollator), decision.told
    assert isinstance(collator.isolation, Restarted if kind in BY_POSITIONS else Masked)
    loss = SupervisedLoss.prepare(model, chunk=4)
    handle = lf.attach(model, lf.LoRA(r=2, init="gaussian"), seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    packed_batches = 0
    for batch in (records[start : start + 6] for start in range(0, len(records), 6)):
        layout = best_layout(batch, collator.limits)
        if layout is None:
            continue
        packed_batches += 1
        packed = collator(batch)
        assert len(packed["input_ids"]) < len(batch)
        order = [batch[place] for row in layout.rows for place in row]
        expected = torch.cat([token_losses(model, Collator(0)([record])) for record in order])
        torch.testing.assert_close(token_losses(model, packed), expected, rtol=1e-6, atol=1e-5)
        plain = Collator(0)(batch)
        for count in (None, 50):
            found, wanted = loss(model, packed, count), loss(model, plain, count)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        ours, theirs = gradients(handle, loss(model, packed)), gradients(handle, loss(model, plain))
        assert len(ours) == len(theirs) > 8
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, **near)
    assert packed_batches


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_mix_records_are_refused(kind: str) -> None:
    model = build(REFUSED[kind]())
    records = make_records()
    with pytest.raises(ConfigError, match="cannot have several records in a row") as raised:
        decided(model, records)
    assert raised.value.found
    decision = decided(model, records, "auto")
    assert isinstance(decision.collator, Collator)
    assert decision.told.startswith("padding: no packing with this model (")


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gpt2"])
def test_the_trial_leaves_the_model_as_it_was(kind: str) -> None:
    model = build(CONFIGS[kind]())
    model.get_decoder().eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    decided(model, make_records())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_packs_unless_a_window_could_go_unseen() -> None:
    records = make_records()
    plain = build(CONFIGS["llama"](), dtype=torch.bfloat16)
    assert isinstance(decided(plain, records).collator.isolation, Masked)
    assert decided(plain, records).collator(records[:6])["attention_mask"].dtype == torch.bfloat16
    window = build(CONFIGS["mistral-window"](), dtype=torch.bfloat16)
    assert isinstance(decided(window, records).collator.isolation, Restarted)


def test_a_window_that_one_record_alone_exceeds_is_kept() -> None:
    # The trial silences a record of the fullest row, which may be the only one that is longer than the window.
    generator = random.Random(0)

    def made(length: int) -> Encoded:
        ids = [generator.randrange(3, 60) for _ in range(length)]
        return Encoded(ids, [*[IGNORED] * (length - 4), *ids[-4:]], "x")

    model = build(CONFIGS["mistral-window"]())
    window = model.config.sliding_window
    records = [made(4 * window), *(made(generator.randrange(max(5, window // 2), window)) for _ in range(40))]
    loss, plain = SupervisedLoss.prepare(model), Collator(0)
    for batch_size in (2, 4):
        collator = decided(model, records, "auto", batch_size=batch_size).collator
        assert not (isinstance(collator, PackingCollator) and isinstance(collator.isolation, Masked))
        for start in range(0, 8, batch_size):
            batch = records[start : start + batch_size]
            with torch.no_grad():
                torch.testing.assert_close(loss(model, collator(batch)), loss(model, plain(batch)))


def test_what_is_decided_is_told() -> None:
    model = build(CONFIGS["llama"]())
    packed = decided(model, make_records(32, beginning=12), "auto")
    assert isinstance(packed.collator, PackingCollator)
    assert packed.told.startswith("packing: several records in a row of up to ")
    assert "% fewer tokens to compute" in packed.told and "--packing false" in packed.told
    alike = [Encoded([number + 3, *range(3, 23)], [*[IGNORED] * 19, 21, 22], "x") for number in range(12)]
    little = decided(model, alike, "auto")
    assert little.collator.__class__ is Collator
    assert little.told == "padding: rows of several records would save 0 % of the work"
    single = decided(model, make_records(), "auto", batch_size=1)
    assert single.told.endswith("a batch is one record")
    off = decided(model, make_records(), False)
    assert isinstance(off.collator, Collator) and off.told == ""


def record(ids: str, learnt: int) -> Encoded:
    tokens = [ord(letter) for letter in ids]
    return Encoded(tokens, [IGNORED] * (len(tokens) - learnt) + tokens[len(tokens) - learnt :], ids)


def text(values: list[int]) -> str:
    return "".join("." if value in (0, IGNORED) else chr(value) for value in values)


def test_a_row_spelt_out() -> None:
    batch = [record("sysABx", 1), record("sysCDEyz", 2), record("sysFv", 1)]
    limits = Limits()
    assert shared_beginning(batch) == 3
    layout = best_layout(batch, limits)
    assert layout is not None and (layout.shared, layout.rows) == (3, ((1, 0, 2),))
    made = PackingCollator(Collator(0), Masked(torch.float32), limits)(batch)
    # The last token of a record is learnt at the next record's first place, which itself is never learnt.
    assert text(made["input_ids"][0].tolist()) == "sysCDEyABFv"
    assert text(made["labels"][0].tolist()) == "......yz.xv"
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 4, 3, 4]]
    assert made[TOKENS] == 6 + 8 + 5
    sees = made["attention_mask"][0, 0] == 0
    rows = ["".join(letter for letter, seen in zip("sysCDEyABFv", row, strict=True) if seen) for row in sees.tolist()]
    assert rows == ["s", "sy", "sys", "sysC", "sysCD", "sysCDE", "sysCDEy", "sysA", "sysAB", "sysF", "sysFv"]


def test_padding_of_a_packed_row_sees_only_padding() -> None:
    batch = [record("sysABCDEFGHIJx", 1), record("sysCy", 1), record("sysDEFGHIJKLMNz", 1), record("sysFv", 1)]
    limits = Limits(width=20)
    layout = best_layout(batch, limits)
    assert layout is not None and len(layout.rows) > 1
    made = PackingCollator(Collator(0), Masked(torch.float32), limits)(batch)
    padded = made["input_ids"] == 0
    assert padded.any()
    sees = made["attention_mask"][:, 0] == 0
    assert sees.any(-1).all()
    for row, places in enumerate(padded):
        assert not sees[row][places][:, ~places].any() and not sees[row][~places][:, places].any()
    assert (made["labels"][padded] == IGNORED).sum() >= padded.sum() - len(layout.rows)


def test_the_token_before_the_first_learnt_one_is_not_shared() -> None:
    assert shared_beginning([record("abcX", 1), record("abcY", 1)]) == 2
    assert shared_beginning([record("abcd", 3), record("abcd", 3)]) == 0
    assert shared_beginning([record("abcd", 0), record("abcd", 0)]) == 3
    assert shared_beginning([record("xbcd", 1), record("abcd", 1)]) == 0


def test_layouts_keep_within_their_limits() -> None:
    batch = make_records(6)
    longest = max(map(len, batch))
    whole = best_layout(batch, Limits())
    assert whole is not None and len(whole.rows) == 1
    assert whole.width == whole.tokens < sum(map(len, batch))
    narrow = best_layout(batch, Limits(width=whole.width - 1))
    assert narrow is not None and len(narrow.rows) == 2 and narrow.width < whole.width
    assert sorted(place for row in narrow.rows for place in row) == [0, 1, 2, 3, 4, 5]
    assert best_layout(batch, Limits(longest=longest - 1)) is None
    assert best_layout(batch, Limits(width=whole.width - 1, one_row=True)) is None
    assert best_layout(batch[:1], Limits()) is None
    apart = best_layout(batch, Limits(shares=False))
    assert apart is not None and apart.shared == 0 and apart.width > whole.width
    # The dearer a wide row is, the more rows there are; in the end, one for each record.
    counts = [best_layout(batch, Limits(balance=balance)) for balance in (1e6, 30.0, 1.0)]
    rows = [len(batch) if layout is None else len(layout.rows) for layout in counts]
    assert rows == sorted(rows) and rows[0] == 1 and rows[-1] > 1


def test_a_batch_with_nothing_to_gain_is_padded() -> None:
    alike = [record("a" * 9, 8), record("b" * 9, 8)]
    collator = PackingCollator(Collator(0), Masked(torch.float32), Limits(balance=1.0))
    made, plain = collator(alike), Collator(0)(alike)
    assert made.keys() == plain.keys() and all(torch.equal(made[name], plain[name]) for name in plain)


@pytest.fixture
def run(
    model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Outcome, list[str]]]:
    """Trains on questions that begin alike; gives the outcome and what was said."""
    # Of so narrow a model, attention would be the dearest part, and packing not worth it.
    monkeypatch.setattr(packing_trial, "BALANCE", 1000)
    draw = random.Random(0)
    rows = [
        {"question": f"what is the sum of {n} and {'1' * draw.randint(1, 9)}?", "answer": f"it is {n}" + "!" * (n % 5)}
        for n in range(50)
    ]
    data = write("sums.jsonl", rows)

    def run(name: str, **changes: Any) -> tuple[Outcome, list[str]]:
        said: list[str] = []
        settings = {
            "model": str(model_dir),
            "data": data,
            "eval_split": 10,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "output_dir": str(tmp_path / name),
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "dropout": 0.0,
            "r": 4,
            "save_steps": 3,
            "samples": 0,
            "use_cpu": True,
            **changes,
        }
        resolved = resolve([("test", settings)])
        return train(resolved, command="test", notify=said.append, console=Console(quiet=True)), said

    return run


def written(outcome: Outcome, event: str) -> list[dict[str, Any]]:
    lines = (outcome.folder.path / "records.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == event]


def test_a_run_is_the_same_run_and_counts_the_same(run: Callable[..., Any]) -> None:
    (packed, said), (padded, silent) = run("packed"), run("padded", packing=False)
    assert [line for line in said if line.startswith("packing: several records in a row")], said
    assert not [line for line in silent if line.startswith(("packing", "padding"))]
    assert packed.steps == padded.steps == 10
    for event, keys in (("step", ("loss", "grad_norm")), ("evaluation", ("loss",))):
        ours, theirs = written(packed, event), written(padded, event)
        assert len(ours) == len(theirs) > 2
        for mine, other in zip(ours, theirs, strict=True):
            assert {**mine, **dict.fromkeys(keys)}.keys() == other.keys()
            for key in keys:
                assert mine[key] == pytest.approx(other[key], rel=2e-4), (event, key)
            for key in ("step", "epoch", "tokens", "supervised_tokens"):
                assert mine.get(key) == other.get(key)


def test_a_run_that_was_stopped_goes_on_with_the_same_rows(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    class Killed(BaseException):
        pass

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args, **kwargs)

    whole, _ = run("whole", dropout=0.1)
    step = AdapterTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", killed)
        with pytest.raises(Killed):
            run("stopped", dropout=0.1)
    resumed, said = run("stopped", dropout=0.1)
    assert resumed.resumed_from == 3 and any(line.startswith("packing: ") for line in said)
    assert resumed.eval_after == whole.eval_after
    ours, theirs = written(resumed, "step"), written(whole, "step")
    assert [one["loss"] for one in ours[-7:]] == [one["loss"] for one in theirs[-7:]]


@pytest.mark.parametrize("value", [True, "true", "auto", False, "false"])
def test_the_setting(value: Any) -> None:
    assert resolve([("test", {"packing": value})]).packing == {"true": True, "false": False}.get(value, value)


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--packing"], True), (["--packing", "false"], False), (["--no-packing"], False), (["--packing=auto"], "auto")],
)
def test_the_option(words: list[str], value: Any) -> None:
    assert resolve(gather(flags={}, extra=words)).packing == value


def test_a_setting_that_is_none() -> None:
    with pytest.raises(ConfigError, match="packing"):
        resolve([("test", {"packing": "sometimes"})])


def test_a_classifier_is_not_packed(run: Callable[..., Any], write: Callable[[str, Any], str]) -> None:
    data = write("labels.jsonl", [{"text": f"film {n}", "label": ["good", "bad"][n % 2]} for n in range(20)])
    with pytest.raises(ConfigError, match="a classifier cannot have several records in a row"):
        run("classes", data=data, packing=True)


def test_the_count_of_transformers_knows_padding_only(run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="cannot count the tokens of packed rows"):
        run("counted", packing=True, include_num_input_tokens_seen="non_padding")
    _, said = run("padded", include_num_input_tokens_seen="non_padding", max_steps=1)
    assert not any(line.startswith("packing") for line in said)
