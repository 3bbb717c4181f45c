"""The same A, B and data, twenty steps of AdamW in each library: the same losses and the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf

STEPS = 20
Loss = Callable[[nn.Module, int], Tensor]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Loss) -> list[float]:
    model.train()
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _parity(oracle, build: Callable[[], nn.Module], method: lf.LoRA, targets: Sequence[str], loss_of: Loss, **settings):
    """Trains both from one file and compares the losses, then the files."""
    theirs = get_peft_model(
        build(),
        LoraConfig(
            r=method.r,
            lora_alpha=method.alpha,
            use_rslora=method.rslora,
            target_modules=list(targets),
            **settings,
        ),
    )
    theirs.save_pretrained(oracle.folder / "start")
    ours = lf.load(build(), oracle.folder / "start", trainable=True)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == ours.num_trainable

    options = {"lr": 1e-2, "weight_decay": 0.01}
    expected = _train(theirs, torch.optim.AdamW(trained, **options), loss_of)
    losses = _train(ours.model, ours.optimizer(torch.optim.AdamW, **options), loss_of)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-4, rtol=1e-4)

    theirs.save_pretrained(oracle.folder / "peft")
    mine, _ = oracle.read(ours.save(oracle.folder / "ours"))
    other, _ = oracle.read(oracle.folder / "peft")
    start, _ = oracle.read(oracle.folder / "start")
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        assert not torch.equal(value, start[key]), key
        torch.testing.assert_close(value, other[key], atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
def test_multi_layer_perceptron(oracle, tiny, rslora) -> None:
    def build() -> nn.Module:
        return tiny.seeded(
            lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))
        )

    generator = torch.Generator().manual_seed(9)
    x = torch.randn(STEPS, 16, 8, generator=generator)
    y = torch.stack([row.argsort(dim=1)[:, 0] % 3 for row in x])

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(x[step]), y[step])

    _parity(oracle, build, lf.LoRA(r=4, alpha=8, rslora=rslora), ["0", "2", "4"], loss_of)


def test_multi_layer_perceptron_with_a_head_in_full(oracle, tiny) -> None:
    def build() -> nn.Module:
        return tiny.seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3)))

    x = torch.randn(STEPS, 16, 8, generator=torch.Generator().manual_seed(9))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(x[step]), x[step].argsort(dim=1)[:, 0] % 3)

    _parity(oracle, build, lf.LoRA(r=4, alpha=8), ["0"], loss_of, modules_to_save=["2"])


def test_embedding_convolution_and_hf_conv1d(oracle, tiny) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 8)
            self.conv = nn.Conv1d(8, 12, 3, padding=1)
            self.out = Conv1D(17, 12)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.conv(self.embed(ids).mT)).mT.contiguous())

    ids = torch.randint(0, 17, (STEPS, 6, 9), generator=torch.Generator().manual_seed(9))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(ids[step]).flatten(0, 1), (ids[step] * 3 % 17).flatten())

    _parity(oracle, lambda: tiny.seeded(Net), lf.LoRA(r=4, alpha=8), ["embed", "conv", "out"], loss_of)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiny_llama(oracle, tiny, checkpointing) -> None:
    def build() -> nn.Module:
        model = tiny.llama()
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    ids = torch.randint(1, tiny.vocabulary, (2, 4, 12), generator=torch.Generator().manual_seed(9))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return model(input_ids=ids[step % 2], labels=ids[step % 2]).loss

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ours, theirs = _parity(oracle, build, lf.LoRA(r=4, alpha=8), targets, loss_of)
    again = PeftModel.from_pretrained(build(), oracle.folder / "ours")
    torch.testing.assert_close(
        oracle.run(again, tiny.tokens()), oracle.run(ours.model, tiny.tokens()), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        oracle.run(theirs, tiny.tokens()), oracle.run(ours.model, tiny.tokens()), atol=1e-2, rtol=1e-2
    )
