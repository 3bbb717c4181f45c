"""`lorafit serve` as a process: what it says, serves, refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")

HELLO = [{"role": "user", "content": "what is 2 plus one?"}]


class Running:
    """A server in a process of its own, once it listens."""

    def __init__(self, folder: Path, *arguments: object, key: str | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment |= {} if key is None else {"LORAFIT_API_KEY": key}
        words = [sys.executable, "-m", "lorafit", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        while not re.match(r"curl ", self.lines[-1] if self.lines else ""):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read() if self.process.stderr else ""
            self.lines.append(line.rstrip("\n"))
        [self.url] = [found[1] for line in self.lines if (found := re.match(r"listening: (http://\S+)", line))]

    def ask(self, model: str, **more: Any) -> Any:
        body = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def serve(*arguments: object, **settings: Any) -> Running:
        made.append(Running(tmp_path, *arguments, **settings))
        return made[-1]

    yield serve
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="session")
def runs(trained: tuple[Path, Any], place: Path) -> Path:
    """A directory with a run, a copy of its adapter, and an adapter that nobody can read."""
    folder = place / "served"
    shutil.copytree(trained[0], folder / "first")
    shutil.copytree(trained[0] / "adapter", folder / "second")
    shutil.copytree(trained[0] / "adapter", folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"no")
    return folder


def test_a_directory_of_adapters(serve: Callable[..., Running], runs: Path) -> None:
    server = serve("--adapters", runs, "--log")
    said = "\n".join(server.lines)
    assert "not served: broken: " in said and "base: llama; adapters: first, second" in said
    answers = {}
    for model in ("llama", "first", "second"):
        made = server.ask(model)
        assert made.status_code == 200, made.text
        answers[model] = made.json()["choices"][0]["message"]["content"]
    assert answers["first"] == answers["second"] != answers["llama"]
    # The line that it prints is one that a shell takes.
    line = server.lines[-1]
    done = subprocess.run(["bash", "-c", f"{line} -s --noproxy '*'"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["model"] == "first"
    status, out, err = server.end()
    assert (status, out.strip().splitlines()[-1]) == (0, "stopped")
    assert "POST /v1/chat/completions first 200" in err and "what is 2" not in err and "Traceback" not in err


def test_ctrl_c_finishes_what_is_being_written(serve: Callable[..., Running], runs: Path) -> None:
    server = serve("--adapters", f"mine={runs / 'second'}")
    done: list[Any] = []
    body = {"model": "mine", "prompt": "what", "max_tokens": 150, "temperature": 1.5, "n": 8, "stream": True, "seed": 3}
    began = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                done.append(line)
                began.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert began.wait(60)
    status, _, err = server.end()
    thread.join(60)
    assert status == 0 and "Traceback" not in err
    assert "data: [DONE]" in done
    with pytest.raises(httpx.ConnectError):
        server.ask("mine")


def test_sigterm_ends_it_too(serve: Callable[..., Running], llama: Path) -> None:
    status, _, err = serve("--model", llama).end(signal.SIGTERM)
    assert status == -signal.SIGTERM and "Traceback" not in err


def test_a_key_from_a_file_and_from_the_environment(serve: Callable[..., Running], llama: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-the-file\n")
    for arguments, key in ((("--api-key-file", "key"), "from-the-file"), ((), "from-the-environment")):
        server = serve("--model", llama, "--name", "base", *arguments, key="from-the-environment")
        assert server.ask("base").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        listed = httpx.get(f"{server.url}/v1/models", headers=headers, trust_env=False).json()["data"]
        assert [card["id"] for card in listed] == ["base"]
        _, out, err = server.end()
        assert key not in "\n".join((*server.lines, out, err))


def test_adapters_that_come_later(serve: Callable[..., Running], runs: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    server = serve("--model", llama, "--adapters", "later", "--allow-load", "--memory", "100MB", "--max-rows", 2)
    assert server.ask("new").status_code == 404
    shutil.copytree(runs / "second", tmp_path / "later" / "new")

    def tell(word: str, **body: str) -> Any:
        return httpx.post(f"{server.url}/v1/{word}_lora_adapter", json=body, timeout=60, trust_env=False)

    assert tell("load", lora_name="new", lora_path=str(runs / "second")).status_code == 404, "not among the allowed"
    assert tell("load", lora_name="new", lora_path="new").text == "Success: LoRA adapter 'new' added successfully."
    assert server.ask("new").status_code == 200
    assert tell("unload", lora_name="new").status_code == 200
    assert server.ask("new").status_code == 404


def test_the_time_limit(serve: Callable[..., Running], llama: Path) -> None:
    server = serve("--model", llama, "--timeout", "0.001s")
    made = server.ask("llama", max_tokens=200)
    assert made.status_code == 504 and "0.001 s" in made.json()["error"]["message"]


# What is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--host", "0.0.0.0"], 2, ["--host", "key", "127.0.0.1"]),
        (["--adapters", "nowhere"], 1, ["no such folder", "nowhere"]),
        (["--adapters", "."], 1, ["no adapter in these directories"]),
        (["--allow-load"], 2, ["--allow-load", "--adapters"]),
        (["--timeout", "soon"], 2, ["--timeout", "60s"]),
        (["--memory", "much"], 2, ["--memory"]),
        (["--dtype", "float8"], 2, ["--dtype"]),
        (["--quantise", "int3"], 2, ["--quantise"]),
        (["--port", "70000"], 2, ["--port"]),
        (["--host", "192.0.2.1", "--api-key-file", "key"], 1, ["cannot listen"]),
        (["--api-key-file", "missing"], 1, ["API key", "missing"]),
        (["--api-key-file", "empty"], 1, ["no API key"]),
        (["--api-key-file", "long"], 1, ["no API key", "several"]),
        (["--model", "nowhere/at/all"], 1, ["no such model"]),
        (["--context", "100000", "--model", "LLAMA"], 1, ["context"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_cannot_be(
    lorafit: Callable[..., Any], llama: Path, tmp_path: Path, arguments: list[str], status: int, words: list[str]
) -> None:
    (tmp_path / "key").write_text("a-key")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_text("two secret-words\n")
    given = [str(llama) if word == "LLAMA" else word for word in arguments]
    port = () if "--port" in given else ("--port", 0)
    made = lorafit("serve", *port, *given)
    assert made.status == status, made.err
    assert all(word in made.err for word in words), made.err
    assert "secret-words" not in made.err and "listening" not in made.out


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(lorafit: Callable[..., Any], llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        made = lorafit("serve", "--model", llama, "--port", taken.getsockname()[1])
    assert made.status == 1 and "--port 0" in made.err and time.monotonic() - began < 5


def test_adapters_of_several_bases(lorafit: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(runs / "second", tmp_path / "mixed" / name)
        path = tmp_path / "mixed" / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": f"base-{name}"}))
    made = lorafit("serve", "--port", 0, "--adapters", "mixed")
    assert made.status == 1 and "base-a: a; base-b: b" in made.err and "--model" in made.err


def test_an_adapter_that_was_named_itself_has_to_be_served(lorafit: Callable[..., Any], runs: Path) -> None:
    made = lorafit("serve", "--port", 0, "--adapters", runs / "second", "--adapters", f"x={runs / 'broken'}")
    assert made.status == 1 and "damaged" in made.err


def test_missing_packages_are_named(lorafit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    made = lorafit("serve", "--port", 0)
    assert made.status == 1 and "pip install 'lorafit[serve]'" in made.err and "'uvicorn'" in made.err
