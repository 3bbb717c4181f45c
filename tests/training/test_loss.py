"""The loss equals the model's own, in value and gradient, and computes no more logits than it says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lorafit.errors import DataError, TrainingError
from lorafit.training import ranks
from lorafit.training.crossentropy import FrozenMatrix, needs_autograd, summed_cross_entropy
from lorafit.training.loss import IGNORED, Batch, SupervisedLoss

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
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "granite-unscaled": lambda: GraniteConfig(**SIZES, logits_scaling=1.0),
    "moe": lambda: MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "moe-router": lambda: MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True),
}
NAMES = {
    "llama": "rows",
    "llama-tied": "rows",
    "gpt2": "rows",
    "gemma2": "columns",
    "cohere": "columns",
    "granite": "columns",
    "granite-unscaled": "rows",
    "moe": "rows",
    "moe-router": "full",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, **kwargs: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    # Dropout would make two runs differ; GPT-2 alone has any.
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if name in config.to_dict():
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, **kwargs).train()


def make_batch(seed: int = 0, lengths: tuple[int, ...] = (11, 7, 9)) -> dict[str, Tensor]:
    """Right-padded sequences that learn their last tokens, one of them a gap in the middle too."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length:] = 0
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    labels[0, 0] = ids[0, 0]  # the first token has nothing before it: it must not count
    labels[0, 2] = ids[0, 2]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learnt(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}), msg=name)


def freeze_all_but(model: nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)


class Count(TorchDispatchMode):
    """Rows of logits that are computed within, product by product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and made.shape[-1] == VOCABULARY:
            self.rows.append(len(made))
        return made


@pytest.mark.parametrize("kind", CONFIGS)
def test_chooses_the_cheapest_exact_way(kind: str) -> None:
    loss = SupervisedLoss.prepare(build(kind))
    assert loss.name == NAMES[kind]
    assert loss.description


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("trained", ["", ".0."], ids=["all", "first layer"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_loss_and_gradients_are_the_models_own(kind: str, trained: str, chunk: int) -> None:
    model = build(kind)
    freeze_all_but(model, trained)
    batch = make_batch()
    theirs = model(**batch).loss
    expected = gradients(model, theirs)
    ours = SupervisedLoss.prepare(model, chunk=chunk)(model, batch)
    torch.testing.assert_close(ours, theirs)
    assert_same(gradients(model, ours), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_accumulated_batches_divide_by_all_their_tokens(kind: str) -> None:
    model = build(kind)
    batches = [make_batch(1, (11, 7)), make_batch(2, (5, 9)), make_batch(3, (4,))]
    items = sum(map(learnt, batches))
    loss = SupervisedLoss.prepare(model)
    theirs = sum(model(**batch, num_items_in_batch=torch.tensor(items)).loss for batch in batches)
    expected = gradients(model, theirs)
    ours = sum(loss(model, batch, num_items_in_batch=torch.tensor(items)) for batch in batches)
    torch.testing.assert_close(ours, theirs)
    assert_same(gradients(model, ours), expected)
    assert loss(model, batches[0], items) == loss(model, batches[0], torch.tensor(items))


def test_the_models_own_loss_is_rescaled_to_accumulated_tokens() -> None:
    model = build("moe-router")
    batch = make_batch()
    loss = SupervisedLoss.prepare(model)
    torch.testing.assert_close(loss(model, batch, 2 * learnt(batch)), model(**batch).loss / 2)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "moe"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_rows_computes_one_row_of_logits_for_each_learnt_token(kind: str, chunk: int) -> None:
    model = build(kind)
    freeze_all_but(model, ".0.")
    batch = make_batch()
    loss = SupervisedLoss.prepare(model, chunk=chunk)
    with Count() as count:
        loss(model, batch).backward()
    # One more row goes on through the model, and tells whether the head is trained; it may be another kind of product.
    assert learnt(batch) <= sum(count.rows) <= learnt(batch) + 1
    assert max(count.rows) <= chunk


def test_columns_computes_only_positions_where_a_sequence_learns() -> None:
    model = build("gemma2")
    batch = make_batch()
    loss = SupervisedLoss.prepare(model)
    with Count() as count:
        loss(model, batch).backward()
    columns = int((batch["labels"][:, 1:] != IGNORED).any(dim=0).sum())
    assert sum(count.rows) == columns * len(batch["labels"]) < batch["labels"].numel()


class AdaptedHead(nn.Linear):
    """An output head with a low-rank update of its own, in parameters that it does not register."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.factors = [torch.randn(3, base.in_features), torch.randn(base.out_features, 3)]
        for factor in self.factors:
            factor.mul_(0.1).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.factors
        return super().forward(x) + x @ down.T @ up.T


@pytest.mark.parametrize("chunk", [4, 1000])
def test_an_adapter_in_the_head_gets_its_gradient(chunk: int) -> None:
    model = build("llama")
    head = AdaptedHead(model.lm_head)
    model.lm_head = head
    freeze_all_but(model, ".0.")
    batch = make_batch()
    found = []
    loss = SupervisedLoss.prepare(model, chunk=chunk)
    assert loss.name == "rows"
    for value in (model(**batch).loss, loss(model, batch)):
        by_name = gradients(model, value)
        by_name |= {f"factor{i}": factor.grad.clone() for i, factor in enumerate(head.factors)}
        for factor in head.factors:
            factor.grad = None
        found.append(by_name)
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradient_checkpointing(kind: str) -> None:
    model = build(kind)
    freeze_all_but(model, ".0.")
    batch = make_batch()
    expected = gradients(model, model(**batch).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model, SupervisedLoss.prepare(model, chunk=4)(model, batch)), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bfloat16_weights(kind: str) -> None:
    model = build(kind, dtype=torch.bfloat16)
    freeze_all_but(model, ".0.")
    batch = make_batch()
    theirs = model(**batch).loss
    expected = gradients(model, theirs)
    ours = SupervisedLoss.prepare(model, chunk=4)(model, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=0.0)
    assert_same(gradients(model, ours), expected, rtol=0.1, atol=2e-3)


class Autocast(nn.Module):
    """A model under autocast in its forward alone, as accelerate has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


@pytest.mark.parametrize("trained", [".0.", ""], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_autocast_around_the_forward_alone(kind: str, trained: str) -> None:
    model = build(kind)
    freeze_all_but(model, trained)
    batch = make_batch()
    loss = SupervisedLoss.prepare(model, chunk=4)
    exact = gradients(model, loss(model, batch))
    wrapped = Autocast(model)
    theirs = wrapped(**batch).loss
    expected = gradients(model, theirs)
    ours = loss(wrapped, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=0.0)
    found = gradients(model, ours)
    assert_same(found, expected, rtol=0.1, atol=2e-3)
    assert any(not torch.equal(found[name], exact[name]) for name in exact), "autocast was not on"


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_distributed_data_parallel(kind: str, unused: bool, tmp_path: Path) -> None:
    model = build(kind)
    freeze_all_but(model, ".0.")
    batch = make_batch()
    expected = gradients(model, model(**batch).loss)
    loss = SupervisedLoss.prepare(model, chunk=4)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        # Twice: what was prepared in the first step for the second is what goes wrong around a forward.
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        gradients(model, loss(wrapped, batch))
        assert_same(gradients(model, loss(wrapped, batch)), expected)
    finally:
        ranks.leave()  # not at once: a thread of gloo that wants the interpreter would be waited for by what holds it


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_learnt_token_has_its_own_loss(kind: str) -> None:
    model = build(kind).eval()
    loss = SupervisedLoss.prepare(model, chunk=4)
    batches = [make_batch(1), make_batch(2, (5, 3))]
    with torch.no_grad():
        found = [loss.each(model, batch) for batch in batches]
        for (values, records), batch in zip(found, batches, strict=True):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            scores = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            wanted = batch["labels"][:, 1:]
            taken = scores.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2)[wanted != IGNORED]
            torch.testing.assert_close(values, -taken)
            assert records.tolist() == (wanted != IGNORED).nonzero()[:, 0].tolist()
            assert len(values) == learnt(batch) and not values.requires_grad


@pytest.mark.parametrize("kind", ["llama", "gemma2", "moe-router"])
def test_a_batch_without_a_token_to_learn(kind: str) -> None:
    model = build(kind)
    loss = SupervisedLoss.prepare(model)
    batch = make_batch()
    batch["labels"][:] = IGNORED
    with pytest.raises(DataError, match="no token to learn"):
        loss(model, batch)
    nothing = loss(model, batch, num_items_in_batch=7)
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert [len(part) for part in loss.each(model, batch)] == [0, 0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_preparing_leaves_the_model_as_it_was(kind: str) -> None:
    model = build(kind)
    model.get_decoder().eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    SupervisedLoss.prepare(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    model = build("llama")
    loss = SupervisedLoss.prepare(model)
    batch = make_batch()
    batch["input_ids"] = batch["input_ids"] + VOCABULARY
    with pytest.raises(IndexError):
        loss(model, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model", [T5ForConditionalGeneration, LlamaForSequenceClassification])
def test_other_models_are_refused(model: type[PreTrainedModel]) -> None:
    config = (
        T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2)
        if model is T5ForConditionalGeneration
        else CONFIGS["llama"]()
    )
    with pytest.raises(TrainingError, match="not a causal language model"):
        SupervisedLoss.prepare(model(config))


def test_a_head_replaced_after_preparing_is_noticed() -> None:
    model = build("llama")
    loss = SupervisedLoss.prepare(model)
    model.lm_head = copy.deepcopy(model.lm_head)
    with pytest.raises(TrainingError, match="did not call the output head"):
        loss(model, make_batch())


def test_data_parallel_is_refused() -> None:
    model = build("llama")
    loss = SupervisedLoss.prepare(model)
    with pytest.raises(TrainingError, match="torchrun"):
        loss(nn.DataParallel(model), make_batch())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [2, 100])
def test_summed_cross_entropy_passes_gradcheck(trained: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator).requires_grad_(trained)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, 6, 3, 3, 1])

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed_cross_entropy(hidden, targets, lambda rows: rows @ weight.T, through_head=trained, chunk=chunk)

    expected = nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(total(hidden, weight), expected)
    assert torch.autograd.gradcheck(total, (hidden, weight))


def test_float16_gradients_keep_the_loss_scale() -> None:
    """A probability of 1e-6 is lost in float16 unless the gradient is scaled before it is rounded."""
    weight = torch.eye(4, dtype=torch.float16)
    hidden = torch.tensor([[16.0, 0.0, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    total = summed_cross_entropy(
        hidden,
        torch.tensor([0]),
        lambda rows: rows @ weight,
        through_head=needs_autograd(hidden.detach() @ weight),
        chunk=1,
    )
    (total * 65536).backward()
    torch.testing.assert_close(hidden.grad[0, 1:].float() / 65536, torch.full((3,), 1.125e-7), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_frozen_matrix_gives_what_calling_it_gives(bias: bool, chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 6, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(23, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.tensor([0, 22, 3, 3, 1, 9, 9])
    found = []
    for head in (FrozenMatrix(weight, offset), lambda rows: nn.functional.linear(rows, weight, offset)):
        leaf = hidden.clone().requires_grad_()
        total = summed_cross_entropy(leaf, targets, head, through_head=False, chunk=chunk)
        (total / 7).backward()
        found.append((total.detach(), leaf.grad))
    assert found[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[0], found[1])
    exact = nn.functional.cross_entropy(nn.functional.linear(hidden, weight, offset).double(), targets, reduction="sum")
    torch.testing.assert_close(found[0][0].double(), exact, rtol=1e-6, atol=1e-6)
    if dtype == torch.float64 and not bias:
        matrix = FrozenMatrix(weight, None)
        assert torch.autograd.gradcheck(
            lambda x: summed_cross_entropy(x, targets, matrix, through_head=False, chunk=chunk),
            hidden.clone().requires_grad_(),
        )


@pytest.mark.parametrize("matrix", [False, True])
def test_a_hopeless_target_has_a_finite_loss(matrix: bool) -> None:
    weight = 300 * torch.eye(4)
    hidden = torch.eye(4).requires_grad_()
    targets = torch.tensor([0, 0, 2, 1])  # two of them with a probability of e^-300: nothing, in float32
    head = FrozenMatrix(weight, None) if matrix else lambda rows: rows @ weight
    total = summed_cross_entropy(hidden, targets, head, through_head=False, chunk=3)
    total.backward()
    assert total.item() == pytest.approx(600.0)
    assert torch.isfinite(hidden.grad).all() and hidden.grad[1, 0] == -300


def test_autocast_reaches_a_frozen_matrix() -> None:
    weight, hidden = torch.randn(23, 6), torch.randn(7, 6)
    targets = torch.arange(7)
    found = []
    for head in (FrozenMatrix(weight, None), lambda rows: rows @ weight.T):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            total = summed_cross_entropy(leaf, targets, head, through_head=False, chunk=4)
        total.backward()
        assert total.dtype == leaf.grad.dtype == torch.float32
        found.append((total.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)
    exact = nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert found[0][0] != exact and found[0][0] == pytest.approx(exact.item(), rel=1e-2)


def test_a_hook_on_the_head_is_heeded() -> None:
    """Whatever changes the head's output from outside counts: it is not taken for its bare matrix then."""
    model = build("llama")
    freeze_all_but(model, ".0.")
    batch = make_batch()
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    loss = SupervisedLoss.prepare(model)
    theirs = model(**batch).loss
    torch.testing.assert_close(loss(model, batch), theirs)
    assert_same(gradients(model, loss(model, batch)), gradients(model, model(**batch).loss))


def test_chunks_are_even() -> None:
    model = build("llama")
    freeze_all_but(model, ".0.")
    loss = SupervisedLoss.prepare(model, chunk=5)
    with Count() as count:
        loss(model, make_batch()).backward()
    # All chunks are about as long: a short one would read the whole head for a row or two.
    assert count.rows[-4:] == [4, 4, 4, 4] and learnt(make_batch()) == 16
