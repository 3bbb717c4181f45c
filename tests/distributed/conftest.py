"""Two processes for a test: of `work.py`, or of the command line under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORK = Path(__file__).with_name("work.py")
Found = dict[str, Any]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """That of a process with one thread, which launchers are not told of any run."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def two_processes(task: str, folder: Path) -> Found:
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, str(WORK), task, str(folder)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=300) for each in running]
    assert all(each.returncode == 0 for each in running), "\n".join(err[-3000:] for _, err in said)
    found: Found = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What two processes find in a task, each task done once."""
    known: dict[str, Found] = {}

    def found(task: str) -> Found:
        if task not in known:
            known[task] = two_processes(task, tmp_path_factory.mktemp(task))
        return known[task]

    return found


# Runs of the command line -----------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer (`model`), sums to learn (`sums.jsonl`) and labelled texts."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("runs")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    # 49 records to learn from: the last batch of an epoch has one, for two processes.
    sums = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}" + "!" * (n % 5)} for n in range(61)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    texts = [{"text": f"a {'good' if n % 2 else 'bad'} film {n}", "label": "yes" if n % 2 else "no"} for n in range(41)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


SETTINGS: dict[str, Any] = {
    "model": "model",
    "data": "sums.jsonl",
    "eval_split": 12,
    "max_steps": 14,
    "learning_rate": 1e-2,
    "samples": 2,
    "max_new_tokens": 4,
    "save_steps": 3,
    "use_cpu": True,
}


def arguments(**settings: Any) -> list[str]:
    """Settings as words of a command line."""
    merged = {**SETTINGS, **settings}
    return [word for key, value in merged.items() for word in ("--set", f"{key}={str(value).lower()}")]


def torchrun(place: Path, *words: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    """Two processes of a command, in a folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*launcher, "-m", "lorafit", command, *words],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def records(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The records of a run."""
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [one for one in found if event is None or one["event"] == event]
