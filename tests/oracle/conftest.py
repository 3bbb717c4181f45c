"""peft as the oracle: adapters written by one library, read by the other, compared in what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import lorafit as lf

Build = Callable[[], nn.Module]
Inputs = Tensor | Mapping[str, Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets peft say what it says of its own, message by message; everything else stays an error."""
    here = Path(__file__).parent
    said_by_peft = (
        # peft takes the rank pattern of AdaLoRA for one of LoRA, and then uses it all the same
        "ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning:peft",
        # peft leaves out what it does not know of a config, and says so
        "ignore:Unexpected keyword arguments .'lorafit'.:UserWarning:peft",
        # peft 0.21 reads a property that transformers 5 renamed
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        # grouped convolutions work in peft's forward; a test shows what merging does
        "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning:peft",
        # peft writes the base embedding beside an adapter that targets it
        "ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft",
        # peft switches the flag per layer in a model that has both layer types
        "ignore:fan_in_fan_out is set to:UserWarning:peft",
        # peft notices tied embeddings and goes on; a test shows what merging does
        "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning:peft",
    )
    for item in items:
        if here in item.path.parents:
            for said in said_by_peft:
                item.add_marker(pytest.mark.filterwarnings(said), append=False)


class Tiny:
    """Tiny models with the same random weights each time."""

    vocabulary = 61

    @staticmethod
    def seeded(make: Build, seed: int = 0) -> nn.Module:
        """What `make` builds, with weights drawn after `seed`."""
        torch.manual_seed(seed)
        return make().eval()

    def llama(self, **settings: Any) -> nn.Module:
        return self.seeded(lambda: LlamaForCausalLM(self._llama(**settings)))

    def llama_classifier(self, **settings: Any) -> nn.Module:
        return self.seeded(lambda: LlamaForSequenceClassification(self._llama(**{"num_labels": 3, **settings})))

    def _llama(self, **settings: Any) -> LlamaConfig:
        return LlamaConfig(
            **{
                "vocab_size": self.vocabulary,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "pad_token_id": 0,
                "initializer_range": 0.2,
                "tie_word_embeddings": False,
                **settings,
            }
        )

    def gpt2(self) -> nn.Module:
        settings = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        return self.seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=self.vocabulary, **settings)))

    def gpt_big_code(self) -> nn.Module:
        settings = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        return self.seeded(lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=self.vocabulary, **settings)))

    def bert(self) -> nn.Module:
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            num_labels=3,
            initializer_range=0.2,
        )
        return self.seeded(lambda: BertForSequenceClassification(config))

    def tokens(self, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
        """Token ids without the padding token, and a mask of ones."""
        ids = torch.randint(1, self.vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Oracle:
    """Writes adapters with one library, reads them with the other, and compares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def run(model: nn.Module, inputs: Inputs) -> Tensor:
        """The output of a model in evaluation mode: a tensor, or the logits of a language model."""
        model.eval()
        with torch.no_grad():
            output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    @staticmethod
    def randomise(tensors: Mapping[str, Tensor], seed: int = 1) -> None:
        """Fills tensors with numbers none of which is zero, so that no factor of an update hides another."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    drawn = torch.randn(tensor.shape, generator=generator) * 0.2
                    tensor.copy_(torch.where(drawn.abs() < 1e-3, torch.full_like(drawn, 0.1), drawn))
                    assert tensor.ne(0).all()

    def peft_adapter(self, model: nn.Module, config: LoraConfig, name: str = "default") -> PeftModel:
        """A model with an adapter made by peft, every number of it random."""
        adapted = get_peft_model(model, config, adapter_name=name)
        own = {
            key: tensor
            for key, tensor in adapted.state_dict().items()
            if f".{name}." in f"{key}." and ("lora_" in key or "modules_to_save" in key)
        }
        assert own
        self.randomise(own)
        for key, tensor in own.items():
            if key.endswith("running_var"):
                tensor.abs_()
        return adapted.eval()

    def written_by_peft(
        self, build: Build, config: LoraConfig, name: str = "default", **options: Any
    ) -> tuple[PeftModel, Path]:
        """A random adapter of peft, and the folder in which peft saved it."""
        adapted = self.peft_adapter(build(), config, name)
        folder = self.folder / "peft"
        adapted.save_pretrained(folder, **options)
        return adapted, folder

    def check_read(
        self,
        build: Build,
        config: LoraConfig,
        inputs: Inputs,
        *,
        name: str = "default",
        merge: bool = True,
        resave: bool = True,
        **options: Any,
    ) -> lf.Handle:
        """peft writes, we read: same outputs, same merged weights, and saved again the same file."""
        base = self.run(build(), inputs)
        theirs, folder = self.written_by_peft(build, config, name, **options)
        expected = self.run(theirs, inputs)
        self.differ(expected, base)

        handle = lf.load(build(), folder, name=name)
        torch.testing.assert_close(self.run(handle.model, inputs), expected, atol=1e-5, rtol=1e-5)
        with handle.disabled():
            assert torch.equal(self.run(handle.model, inputs), base)
        if resave:
            self.same_tensors(handle.save(self.folder / "again"), folder if name == "default" else folder / name)
        if merge:
            self.same_merged(handle, theirs)
            torch.testing.assert_close(self.run(handle.model, inputs), expected, atol=1e-4, rtol=1e-4)
            handle.unmerge()
        return handle

    def check_written(
        self,
        build: Build,
        method: lf.LoRA,
        inputs: Inputs,
        *,
        task_type: str | None = None,
        resave: bool = True,
        **settings: Any,
    ) -> PeftModel:
        """We write, peft reads: same outputs, and saved again by peft the same file."""
        base = self.run(build(), inputs)
        handle = lf.attach(build(), method, seed=0, **settings)
        self.randomise(dict(handle.named_parameters()))
        expected = self.run(handle.model, inputs)
        self.differ(expected, base)

        folder = handle.save(self.folder / "ours", task_type=task_type)
        theirs = PeftModel.from_pretrained(build(), folder, adapter_name=handle.name)
        torch.testing.assert_close(self.run(theirs, inputs), expected, atol=1e-5, rtol=1e-5)
        if resave:
            theirs.save_pretrained(self.folder / "again", save_embedding_layers=False)
            again = self.folder / "again"
            self.same_tensors(folder, again if handle.name == "default" else again / handle.name)
        return theirs

    @staticmethod
    def differ(one: Tensor, other: Tensor) -> None:
        """An adapter that changes nothing would prove nothing."""
        assert (one - other).abs().max() > 2e-3

    @staticmethod
    def same_merged(handle: lf.Handle, theirs: PeftModel) -> None:
        """Merges both; every base weight is then the same in both models."""
        handle.merge()
        merged = theirs.merge_and_unload().state_dict()
        ours = {key: value for key, value in handle.model.state_dict().items() if ".adapters." not in f".{key}"}
        assert ours.keys() == merged.keys()
        for key, value in merged.items():
            torch.testing.assert_close(
                ours[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )

    @staticmethod
    def same_tensors(ours: Path, theirs: Path) -> None:
        """Two folders hold the same tensors under the same keys, bit for bit; base embeddings aside."""
        mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
        extra = {
            key for key in other.keys() - mine.keys() if key.endswith((".base_layer.weight", "embed_tokens.weight"))
        }
        assert mine.keys() == other.keys() - extra
        for key, value in mine.items():
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key

    def write(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "hand") -> Path:
        """A folder written by hand: nothing but json and safetensors."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    @staticmethod
    def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the config of a folder, by nothing but safetensors and json."""
        config = json.loads((folder / "adapter_config.json").read_text())
        return load_file(folder / "adapter_model.safetensors"), config


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    return Oracle(tmp_path)


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def edit() -> Callable[..., Path]:
    """Changes settings in a folder's adapter_config.json."""

    def change(folder: Path, **settings: Any) -> Path:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return folder

    return change


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[dict[str, Tensor]], None]], Path]:
    """Changes the tensors of a folder through a function that gets them as a dictionary."""

    def change(folder: Path, how: Callable[[dict[str, Tensor]], None]) -> Path:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        how(tensors)
        save_file(tensors, path, {"format": "pt"})
        return folder

    return change
