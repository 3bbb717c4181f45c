"""The command line in this process, tiny models in directories, and runs that several tests look at."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.cli.main import main
from tests.training.encoders import MEAN, encoder, ratings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def call(*arguments: object, folder: Path, stdin: str = "") -> Result:
    """Runs one command in `folder`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, here = sys.stdin, Path.cwd()
    os.chdir(folder)
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    finally:
        sys.stdin = before
        os.chdir(here)
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture
def lorafit(tmp_path: Path) -> Run:
    """Runs one command in the test's own folder."""

    def run(*arguments: object, stdin: str = "") -> Result:
        return call(*arguments, folder=tmp_path, stdin=stdin)

    return run


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models, data and shared runs are."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def sums(place: Path) -> Path:
    """Questions and answers."""
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}"} for n in range(80)]
    return jsonl(place / "sums.jsonl", rows)


@pytest.fixture(scope="session")
def films(place: Path) -> Path:
    """Labelled texts whose words decide."""
    chance = random.Random(0)
    words = {"positive": ["good", "fine", "great"], "negative": ["bad", "poor", "awful"]}
    rows = []
    for n in range(96):
        label = ["positive", "negative"][n % 2]
        rows.append({"text": " ".join([*chance.choices(words[label], k=3), "film", f"n{n}"]), "label": label})
    return jsonl(place / "films.jsonl", rows)


@pytest.fixture(scope="session")
def llama(place: Path) -> Path:
    """A language model with tied embeddings and a trained byte-level tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bare.train_from_iterator(["what is plus one? it is one two three"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    return place / "llama"


@pytest.fixture(scope="session")
def bert(place: Path) -> Path:
    """An encoder without a classifier's head."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "good", "fine", "great", "bad", "poor", "awful"]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "bert")
    return place / "bert"


@pytest.fixture(scope="session")
def command(llama: Path, sums: Path) -> list[str]:
    """A training command of a second."""
    options = (
        "--eval-split 8 --max_steps 10 --lora_r 4 --learning-rate 1e-2 --samples 2 --max-new-tokens 6 --save-steps 5"
    )
    return ["train", "--model", str(llama), "--data", str(sums), *options.split()]


@pytest.fixture(scope="session")
def trained(place: Path, command: list[str]) -> tuple[Path, Result]:
    """A finished run, and what its command wrote."""
    result = call(*command, "--output-dir", "trained", folder=place)
    return place / "trained", result


@pytest.fixture(scope="session")
def classified(place: Path, bert: Path, films: Path) -> tuple[Path, Result]:
    """A finished run of a classifier."""
    options = "--eval-split 24 --max-steps 60 --r 4 --learning-rate 1e-2 --eval-strategy no --save-strategy no"
    result = call(
        *("train", "--model", bert, "--data", films, "--output-dir", "classified", *options.split()), folder=place
    )
    return place / "classified", result


@pytest.fixture(scope="session")
def pipeline(place: Path) -> Path:
    """A tiny diffusion pipeline that draws pictures of 16 × 16 pixels."""
    pytest.importorskip("diffusers", reason="the commands for pictures need diffusers")
    from tests.cli.tiny_pipeline import save_pipeline

    return save_pipeline(place / "pipeline")


@pytest.fixture(scope="session")
def discs(place: Path) -> Path:
    """Pictures of a subject."""
    from tests.cli.tiny_pipeline import save_pictures

    return save_pictures(place / "discs")


@pytest.fixture(scope="session")
def learning(pipeline: Path, discs: Path) -> list[str]:
    """A DreamBooth command of some seconds."""
    options = (
        "--resolution 16 --num-class-images 3 --max-steps 6 --learning-rate 5e-2 --r 4 --sample-every 3 "
        "--sample-count 2 --sample-steps 2 --evaluate-every 3 --evaluation-draws 2 --save-every 3"
    )
    prompts = ["--instance-prompt", "a sks disc", "--class-prompt", "a disc", "--keep-prompt", "a square"]
    return ["dreambooth", "--pipeline", str(pipeline), "--instance-images", str(discs), *prompts, *options.split()]


@pytest.fixture(scope="session")
def learnt(place: Path, learning: list[str]) -> tuple[Path, Result]:
    """A finished DreamBooth run, and what its command wrote."""
    result = call(*learning, "--output-dir", "learnt", folder=place)
    assert result.status == 0, result.err
    return place / "learnt", result


@pytest.fixture(scope="session")
def sentences(place: Path) -> Path:
    """An encoder as a package lays it out: in a directory of its own, trained to be read by its mean."""
    return encoder(place / "package" / "model", MEAN)


@pytest.fixture(scope="session")
def rated(place: Path) -> Path:
    """Sentences with the mean of their words' ratings."""
    return ratings(place / "rated.jsonl")


@pytest.fixture(scope="session")
def regressed(place: Path, sentences: Path, rated: Path) -> tuple[Path, Result]:
    """A finished run of a regression, begun with the package's directory."""
    options = "--eval-split 30 --num-train-epochs 8 --r 4 --learning-rate 1e-2 --save-strategy no --task regression"
    command = ("train", "--model", sentences.parent, "--data", rated, "--output-dir", "regressed", *options.split())
    return place / "regressed", call(*command, folder=place)
