"""`lorafit export`: every format from the command line, what it says, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit import store
from lorafit.exporting import flat, gguf_adapter, gguf_model, vllm

Run = Callable[..., Any]


@pytest.fixture
def adapter(trained: tuple[Path, Any]) -> Path:
    return trained[0] / "adapter"


def last(result: Any) -> str:
    lines: list[str] = result.out.strip().splitlines()
    return lines[-1]


def test_hf_is_a_model_with_the_logits_of_base_and_adapter(lorafit: Run, adapter: Path, tmp_path: Path) -> None:
    result = lorafit("export", adapter, "--to", "hf", "--output-dir", "out")
    assert result.status == 0 and last(result).startswith("max logit difference "), result.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "| data | sums.jsonl |",
        "| licence of the data | unknown |",
        "| held-out loss after |",
        "method_options",
    ):
        assert said in card, said
    assert not list(tmp_path.glob(".*partial*"))


def test_vllm_prints_the_line_that_serves_it(lorafit: Run, adapter: Path, llama: Path, tmp_path: Path) -> None:
    result = lorafit("export", adapter, "--to", "vllm", "--output-dir", "out", "--name", "sums")
    assert result.status == 0 and last(result).startswith("max ΔW difference "), result.err
    line = next(line for line in result.out.splitlines() if line.startswith("vllm serve"))
    words = ["vllm", "serve", str(llama), "--enable-lora", "--lora-modules", "sums=out", "--max-lora-rank", "8"]
    assert shlex.split(line) == words
    assert store.read(tmp_path / "out").config["r"] == 8
    assert "peft" in result.out


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_a_merged_gguf_has_model_and_tokenizer(lorafit: Run, adapter: Path, tmp_path: Path, dtype: str) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    result = lorafit("export", adapter, "--to", "gguf", "--merged", "--dtype", dtype, "--output-dir", "out")
    assert result.status == 0 and last(result).startswith("max logit difference "), result.err
    assert result.err == ""
    fields = {key: each.contents() for key, each in GGUFReader(tmp_path / "out" / gguf_model.FILE).fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.model"] == "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=gguf_model.FILE)
    text = "what is 12 plus one?<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_an_adapter_in_gguf(lorafit: Run, adapter: Path, tmp_path: Path) -> None:
    result = lorafit("export", adapter, "--to", "gguf", "--output-dir", "out", "--dtype", "float16", "--json")
    assert result.status == 0, result.err
    assert result.json["dtype"] == "float16" and result.json["tensors"] == 14
    assert 0 < result.json["difference"] <= result.json["tolerance"]
    assert (tmp_path / "out" / gguf_adapter.FILE).is_file()


def test_dora_and_what_else_a_format_cannot_hold_is_refused_before_anything_is_written(
    lorafit: Run, command: list[str], tmp_path: Path
) -> None:
    trained = lorafit(*command, "--method", "dora", "--samples", "0", "--output-dir", "dora")
    assert trained.status == 0, trained.err
    for to in ("vllm", "gguf"):
        result = lorafit("export", "dora/adapter", "--to", to, "--output-dir", "out")
        assert result.status == 1 and "DoRA" in result.err and "--to hf" in result.err
        assert not (tmp_path / "out").exists()
    near = lorafit("export", "dora/adapter", "--to", "vllm", "--output-dir", "near", "--r", "8")
    assert near.status == 0 and near.err.count("relative error") == 1
    unet = lorafit("export", "dora/adapter", "--to", "diffusers", "--output-dir", "out")
    assert unet.status == 1 and "--component" in unet.err
    text = lorafit("export", "dora/adapter", "--to", "diffusers", "--output-dir", "te", "--component", "text_encoder")
    assert text.status == 0 and "max ΔW difference" in last(text), text.err


def test_a_name_that_would_split_the_word_of_vllm_is_given_as_json() -> None:
    line = shlex.split(vllm.serve_line("base", "a=b", Path("x,y"), 8))
    assert json.loads(line[5]) == {"name": "a=b", "path": "x,y"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "guff"], "gguf"),
        (["--to", "hf", "--merged"], "--merged"),
        (["--to", "gguf", "--untie"], "--untie"),
        (["--to", "vllm", "--r", "0"], "--r"),
        (["--to", "gguf", "--merged", "--r", "4"], "--r"),
        (["--to", "vllm", "--dtype", "q8_0"], "float32, float16, bfloat16"),
        (["--to", "gguf", "--dtype", "q8_0"], "float32, float16, bfloat16"),
        (["--to", "diffusers", "--component", "unit"], "unet"),
        (["--to", "diffusers", "--model", "here"], "--model"),
    ],
)
def test_wrong_words(lorafit: Run, adapter: Path, words: list[str], said: str) -> None:
    result = lorafit("export", adapter, *words, "--output-dir", "out")
    assert result.status == 2 and said in result.err


def test_a_directory_that_is_not_empty_stays_as_it_is(lorafit: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    result = lorafit("export", adapter, "--to", "vllm", "--output-dir", "out")
    assert result.status == 2 and "not empty" in result.err
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]


def test_files_that_do_not_agree_stay_and_the_status_is_1(
    lorafit: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        flat.Flat, "scaled", lambda own, path: (own.plain.pairs[path].up * 9, own.plain.pairs[path].down)
    )
    result = lorafit("export", adapter, "--to", "vllm", "--output-dir", "out")
    assert result.status == 1 and "the files were left there" in result.err
    assert (tmp_path / "out" / store.WEIGHTS).is_file()


def test_a_full_disk_leaves_nothing(
    lorafit: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    monkeypatch.setattr(store, "save_file", full)
    for to in ("gguf", "vllm"):
        result = lorafit("export", adapter, "--to", to, "--output-dir", "out")
        assert result.status == 1 and result.err.count("free some space") == result.err.count("where:") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_has_no_name_in_gguf_is_refused(
    lorafit: Run, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    path.write_text(json.dumps(described))
    result = lorafit("export", "other", "--to", "gguf", "--merged", "--output-dir", "out")
    assert result.status == 1 and "tokenizer" in result.err and "smollm" in result.err
    assert not (tmp_path / "out").exists()


def test_licences_come_from_the_cards_that_are_here_and_are_unknown_otherwise(tmp_path: Path) -> None:
    from lorafit.exporting.origin import licence_of

    assert licence_of(str(tmp_path), None, "model") == "unknown"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\n# a model\n")
    assert licence_of(str(tmp_path), None, "model") == "mit"
    (tmp_path / "README.md").write_text("# a model\nlicense: gpl\n")
    assert licence_of(str(tmp_path), None, "model") == "unknown"
    (tmp_path / "lorafit.json").write_text('{"licence": "Apache-2.0"}')
    assert licence_of(str(tmp_path), None, "model") == "apache-2.0"
