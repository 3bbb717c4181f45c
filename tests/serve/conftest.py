"""Tiny models of several families, adapters for them, and a bank that gives each row its own in the plainest way."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.serve.bank import FullError
from lorafit.serve.batch import Forward
from lorafit.serve.engine import Engine, Limits
from lorafit.serve.requests import Asked, Finish, Piece, Sampling
from lorafit.serve.row import Row
from lorafit.serve.runnable import context, windows
from lorafit.serve.schedule import Schedule

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 160
"""Of the models that the engine's tests make."""


def make_tokenizer() -> Any:
    """Every byte is a token; two line breaks in a row are one; ChatML's tokens are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["ĊĊ"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """(model, tokenizer): a Llama with random weights. Whoever changes the model copies it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_dir(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = tiny
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny: tuple[Any, Any], tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sub-folder for each of some adapters of `tiny`."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {
        "lora": lf.LoRA(r=4),
        "small": lf.LoRA(r=2, rslora=True),
        "dora": lf.DoRA(lf.LoRA(r=4)),
        "vera": lf.VeRA(r=8),
    }
    for seed, (name, method) in enumerate(methods.items()):
        model = copy.deepcopy(tiny[0])
        targets = ["q_proj", "v_proj"] if name == "small" else "all-linear"
        handle = lf.attach(model, method, targets=targets, seed=seed)
        numbers = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.2)
        handle.save(folder / name, base_model=str(tiny_dir), task_type="CAUSAL_LM")
    return folder


def make_model(kind: str) -> Any:
    """A tiny model with random weights: "llama", "gpt2", "mistral" (all layers slide) or "gemma2" (every other one)."""
    import transformers as hf

    torch.manual_seed(1)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": None}
    common |= {"eos_token_id": None, "pad_token_id": 0}
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 96,
    }
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common, **shape)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**common, n_embd=24, n_layer=3, n_head=4, n_positions=96, n_inner=40)
        ),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**common, **shape, sliding_window=7)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**common, **shape, sliding_window=7, query_pre_attn_scalar=6)
        ),
    }
    return made[kind]().eval()


class PlainBank:
    """Adapters that add a matrix of their own to what each block's MLP computes, told apart row by row.

    Args:
        model: what they are for.
        names: of the adapters; that of one called "nan" is not finite, one called "broken" fails in a pass.
        room: how many may be in use at a time.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ("a", "b", "c"), room: int = 99) -> None:
        width = model.get_input_embeddings().weight.shape[1]
        numbers = torch.Generator().manual_seed(5)
        self.matrices: dict[str | None, Tensor] = {None: torch.zeros(width, width)}
        for name in names:
            self.matrices[name] = torch.randn(width, width, generator=numbers) * 0.4
        if "nan" in self.matrices:
            self.matrices["nan"] = torch.full((width, width), torch.nan)
        self.uses: Counter[str | None] = Counter()
        self.passes: list[tuple[str | None, ...]] = []
        self._room = room
        self._loose = False
        self._now: tuple[str | None, ...] | None = None
        for path, module in model.named_modules():
            if path.endswith(".mlp"):
                module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._now is not None and output.shape[0] == len(self._now)
        return output + torch.bmm(inputs[0], torch.stack([self.matrices[name] for name in self._now]).to(output.dtype))

    def known(self, name: str) -> bool:
        return name in self.matrices

    def take(self, name: str | None) -> None:
        if name not in self.matrices:
            raise lf.CheckpointError("the file is damaged", where="/secret/place")
        if name is not None and not self.uses[name] and len(+self.uses) >= self._room:
            raise FullError("there is no room")
        if name is not None:
            self.uses[name] += 1

    def drop(self, name: str | None) -> None:
        if name is not None:
            assert self.uses[name] > 0
            self.uses[name] -= 1

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """Within it one row has this adapter, which nobody has to have taken."""
        self._loose = True
        try:
            with self.rows([name]):
                yield
        finally:
            self._loose = False

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        if "broken" in names:
            raise RuntimeError("out of memory")
        assert all(name is None or self.uses[name] or self._loose for name in names)
        self.passes.append(tuple(names))
        self._now = tuple(names)
        try:
            yield
        finally:
            self._now = None


class Characters:
    """Stands in for a tokenizer: each token is one character, so that a text tells the tokens."""

    FIRST = 0x4E00

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(self.FIRST + token) for token in ids)

    @classmethod
    def ids(cls, text: str) -> list[int]:
        return [ord(letter) - cls.FIRST for letter in text]


class Told:
    """Takes the pieces of one request, and waits for the last."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._begun = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.thread = threading.current_thread()
        self._begun.set()
        if piece.finish is not None:
            self._ended.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return Characters.ids(self.text)

    @property
    def last(self) -> Piece:
        assert [piece.finish is not None for piece in self.pieces] == [False] * (len(self.pieces) - 1) + [True]
        return self.pieces[-1]

    @property
    def finish(self) -> Finish | None:
        return self.last.finish

    def wait(self, seconds: float = 20.0) -> Told:
        assert self._ended.wait(seconds), "no last piece"
        return self

    def begun(self, seconds: float = 20.0) -> Told:
        assert self._begun.wait(seconds), "no piece"
        return self


def ask(ids: Sequence[int], tokens: int = 8, adapter: str | None = None, **settings: Any) -> Asked:
    """A greedy request whose text tells its tokens, unless `settings` say otherwise."""
    ends = tuple(settings.pop("ends", ()))
    tokenizer = settings.pop("tokenizer", Characters())
    return Asked(adapter, tuple(ids), Sampling(tokens, **{"temperature": 0.0, **settings}), tokenizer, ends)


def alone(model: Any, bank: PlainBank, asked: Asked) -> list[int]:
    """What transformers' own `generate` writes for one request, without the token that ends it."""
    ids = torch.tensor([asked.ids])
    with torch.no_grad(), bank.acting(asked.adapter):
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.sampling.max_tokens,
            do_sample=False,
            eos_token_id=list(asked.ends) or None,
            pad_token_id=0,
        )
    written = made[0, ids.shape[1] :].tolist()
    return written[:-1] if written[-1] in asked.ends else written


def requests(numbers: random.Random, count: int, longest: int = 40, tokens: int = 30) -> list[Asked]:
    """Greedy requests of many lengths, for all adapters, some of which end by a token."""
    made = []
    for _ in range(count):
        ids = [numbers.randrange(1, VOCABULARY) for _ in range(numbers.choice([1, 2, 5, 17, longest]))]
        ends = tuple(numbers.sample(range(VOCABULARY), 4))
        made.append(ask(ids, numbers.randrange(1, tokens), numbers.choice((None, "a", "b", "c")), ends=ends))
    return made


def drive(
    model: Any, bank: PlainBank, asked: Sequence[Asked], limits: Limits, numbers: random.Random
) -> tuple[list[Told], Schedule]:
    """Answers requests without a thread; which of them begin when is random."""
    schedule = Schedule(Forward(model, bank, windows(model)), bank, limits)
    told = [Told() for _ in asked]
    waiting = [Row(one, tell, context(model, limits), None) for one, tell in zip(asked, told, strict=True)]
    while waiting or schedule.running:
        while waiting and numbers.random() < 0.4 and schedule.fits(waiting[0]):
            assert schedule.admit(waiting.pop(0))
        schedule.turn(0.0)
    return told, schedule


def slowed(rows: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """A bank's `rows` with passes that take some time."""

    def slow(names: Sequence[str | None]) -> Any:
        time.sleep(seconds)
        return rows(names)

    return slow


@pytest.fixture
def model() -> Any:
    """A Llama with the vocabulary of `Characters`."""
    return make_model("llama")


@pytest.fixture
def bank(model: Any) -> PlainBank:
    """Adapters for it."""
    return PlainBank(model, ("a", "b", "c", "nan", "broken"))


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the engine's tests are made of."""
    return SimpleNamespace(
        alone=alone,
        ask=ask,
        Characters=Characters,
        drive=drive,
        make_model=make_model,
        PlainBank=PlainBank,
        requests=requests,
        slowed=slowed,
        Told=Told,
    )


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    """Makes engines, which are stopped at the test's end."""
    made: list[Engine] = []

    def engine_of(model: Any, bank: Any, *, start: bool = True, **limits: Any) -> Engine:
        engine = Engine(model, bank, Limits(**limits))
        made.append(engine)
        if start:
            engine.start()
        return engine

    yield engine_of
    for engine in made:
        engine.stop(wait=0.0)
