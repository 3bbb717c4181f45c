"""Runs over a quantised base: what they hold, say, learn and refuse, and that they go on bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.errors import ConfigError, MissingExtraError
from lorafit.quant.modules import Int8Layer
from lorafit.training import quantised
from lorafit.training.config import resolve
from lorafit.training.models import Located
from lorafit.training.outcome import Outcome
from lorafit.training.quantised import Nf4, load_base, quantise_loaded
from lorafit.training.run import train
from lorafit.training.trainer import AdapterTrainer

ASIDE = Path(sys.prefix) / "quant"
"""Where `make` puts bitsandbytes, aside from what every other test imports."""
QUIET = Console(quiet=True)


@pytest.fixture
def settings(model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path) -> dict[str, Any]:
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}" + "!" * (n % 5)} for n in range(60)]
    return {
        "model": str(model_dir),
        "data": write("sums.jsonl", rows),
        "eval_split": 12,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "r": 4,
        "save_steps": 2,
        "samples": 1,
        "max_new_tokens": 4,
        "use_cpu": True,
        "quantise": "int8",
    }


@pytest.fixture
def run(settings: dict[str, Any]) -> Callable[..., Outcome]:
    def run(said: list[str] | None = None, without: tuple[str, ...] = (), **changes: Any) -> Outcome:
        flat = {name: value for name, value in {**settings, **changes}.items() if name not in without}
        resolved = resolve([("test", flat)])
        return train(resolved, command="test", notify=([] if said is None else said).append, console=QUIET)

    return run


def tensors(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.adapter / "adapter_model.safetensors")


def packed(model: torch.nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Int8Layer)]


def test_a_run_learns_over_int8_and_says_what_it_holds(run: Callable[..., Outcome]) -> None:
    said: list[str] = []
    outcome = run(said)
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before - 0.1
    line = next(line for line in said if line.startswith("base quantised to int8: "))
    assert "14 layers, relative error 0." in line and " instead of " in line
    kept = json.loads((outcome.folder.path / "settings.json").read_text())
    assert kept["quantise"] == "int8"


def test_a_killed_run_over_int8_goes_on_bit_for_bit(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    whole, steps, original = run(output_dir=str(tmp_path / "whole")), iter(range(100)), AdapterTrainer.training_step

    def step_then_kill(self: Any, *args: Any, **options: Any) -> Any:
        if next(steps) == 5:
            raise KilledError
        return original(self, *args, **options)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_kill)
    with pytest.raises(KilledError):
        run(output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    resumed = run(output_dir=str(tmp_path / "cut"))
    assert resumed.resumed_from == 4 and resumed.eval_after == whole.eval_after
    first, second = tensors(whole), tensors(resumed)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ConfigError, match="quantise was 'int8'"):
        run(output_dir=str(tmp_path / "cut"), quantise="none")


@pytest.mark.parametrize(
    ("method", "without"),
    [("delta-lora", ("dropout",)), ("dora", ("dropout",)), ("adalora", ("r",)), ("lora-drop", ())],
)
def test_other_methods_run_over_int8(run: Callable[..., Outcome], method: str, without: tuple[str, ...]) -> None:
    outcome = run(method=method, without=without)
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "cheap"},
        {"recompute": "blocks"},
        {"init": "pissa"},
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"targets": ["1.mlp.up_proj", "1.mlp.down_proj"], "prefix_cache": True, "max_steps": 12},
    ],
    ids=str,
)
def test_other_settings_run_over_int8(run: Callable[..., Outcome], changes: dict[str, Any]) -> None:
    outcome = run(**changes)
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_tensor_by_tensor_is_the_loaded_model_quantised(tmp_path: Path, tied: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    made.generation_config.max_length = 77
    made.save_pretrained(tmp_path)
    located = Located(str(tmp_path), "tiny")
    streamed, _ = load_base("int8", located, torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    quantise_loaded("int8", loaded)
    one, other = streamed.state_dict(), loaded.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert len(packed(streamed)) == 14 and not streamed.training and streamed.generation_config.max_length == 77
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, loaded(ids).logits)


def test_the_plain_model_is_never_there(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "load_causal", None)
    model, _ = load_base("int8", Located(settings["model"], "tiny"), torch.bfloat16)
    assert len(packed(model)) == 14 and model.model.norm.weight.dtype == torch.bfloat16


def test_what_is_said_is_what_would_have_been_loaded(settings: dict[str, Any]) -> None:
    located = Located(settings["model"], "tiny")
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        _, told = load_base("int8", located, dtype)
        plain = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
        held = [*plain.parameters(), *plain.buffers()]
        sizes.append(sum(one.numel() * one.element_size() for one in held))
        assert f"instead of {sizes[-1] / 1e6:.2f} MB" in told
    assert sizes[1] < 0.6 * sizes[0]


def test_a_checkpoint_with_other_names_is_loaded_whole(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    transformers.GPT2Model(config).save_pretrained(tmp_path)  # without the prefix of the model with a head
    model, told = load_base("int8", Located(str(tmp_path), "tiny"), torch.float32)
    assert len(packed(model)) == 8 and told.startswith("base quantised to int8")


def test_what_is_trained_in_full_stays_plain(run: Callable[..., Outcome], settings: dict[str, Any]) -> None:
    model, _ = load_base("int8", Located(settings["model"], "tiny"), torch.float32, ["layers.1.mlp"])
    assert len(packed(model)) == 11 and not any("layers.1.mlp" in path for path in packed(model))
    outcome = run(modules_to_save=["layers.1.mlp"])
    assert any("layers.1.mlp" in key for key in tensors(outcome))


def test_shared_weights_stay_plain_and_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[2].weight = model[0].weight
    told = quantise_loaded("int8", model)
    assert packed(model) == ["1"] and "2 linear layers stay as they are (0, 2)" in told
    with pytest.raises(ConfigError, match="no layer of this model"):
        quantise_loaded("int8", torch.nn.Sequential(torch.nn.Embedding(4, 4)))


def test_what_is_quantised_already_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    config = json.loads((Path(settings["model"]) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quantised already"):
        load_base("int8", Located(str(folder), "packed"), torch.float32)


def test_settings(run: Callable[..., Outcome]) -> None:
    said: list[str] = []
    assert resolve([("a file", {"load_in_4bit": True})], said.append).quantise == "nf4"
    assert resolve([("a file", {"load_in_4bit": False})]).quantise == "none" == resolve([]).quantise
    assert said == ["load_in_4bit is called quantise here"]
    with pytest.raises(ConfigError, match="'int8' or 'nf4'"):
        resolve([("a file", {"quantise": "int3"})])
    with pytest.raises(ConfigError, match="write quantise: int8"):
        resolve([("a file", {"load_in_8bit": True})])
    with pytest.raises(ConfigError, match="cannot be compiled"):
        run(quantise="nf4", compile=True)


def test_nf4_without_its_package_names_the_install_line(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorafit\[quant\]'"):
        run(quantise="nf4")


OVER_NF4 = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from rich.console import Console
from lorafit.training.config import resolve
from lorafit.training.run import train
from lorafit.training.trainer import AdapterTrainer
from lorafit.cli.main import main

settings = json.loads(sys.argv[1])
folder, said = Path(settings["output_dir"]), []


def run(name, **changes):
    changed = resolve([("test", {**settings, "output_dir": str(folder / name), **changes})])
    return train(changed, command="test", notify=said.append, console=Console(quiet=True))


whole, original, steps = run("whole"), AdapterTrainer.training_step, iter(range(100))


def kill(self, *args, **options):
    if next(steps) == 5:
        raise KeyError
    return original(self, *args, **options)


AdapterTrainer.training_step = kill
try:
    run("cut")
except KeyError:
    AdapterTrainer.training_step = original
resumed = run("cut")
name = "adapter_model.safetensors"
status = main(["eval", str(whole.adapter), "--json"])
print()
print("RESULT " + json.dumps({
    "said": said, "before": whole.eval_before, "after": whole.eval_after, "resumed": resumed.resumed_from,
    "same": (whole.adapter / name).read_bytes() == (resumed.adapter / name).read_bytes(), "status": status,
}))
"""


def test_nf4_learns_goes_on_bit_for_bit_and_is_measured_again(settings: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None and not (ASIDE / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not installed")
    paths = [str(Path(lf.__file__).parents[1]), str(ASIDE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    # Without answers and with the first loss remembered, the process that goes on evaluates later than the first one.
    given = json.dumps({**settings, "quantise": "nf4", "samples": 0})
    done = subprocess.run(
        [sys.executable, "-c", OVER_NF4, given], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert found["same"] and found["resumed"] == 4 and found["after"] < found["before"] - 0.1
    assert any(line.startswith("base quantised to nf4: ") for line in found["said"])
    scores = json.loads(done.stdout[done.stdout.index("{") : done.stdout.index("RESULT ")])["scores"]
    assert scores["adapter"]["loss"] == pytest.approx(found["after"], abs=1e-6)
    assert scores["base"]["loss"] == pytest.approx(found["before"], abs=1e-6)


def test_nf4_is_priced_as_it_is_stored() -> None:
    assert Nf4().bytes(128, 64) == 128 * 64 // 2 + 4 * 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantise_loaded("none", torch.nn.Linear(2, 2)) == ""
