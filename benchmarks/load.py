"""Many clients at once on a server of this machine: right answers, times to the first token, and what stays behind.

The clients do what clients do: they chat, with and without a stream, ask for several completions, go away in the midst,
send what is wrong, and load and unload adapters. Each greedy answer is compared with what transformers' own `generate`
gives for that prompt with that adapter alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.stored import FOLDER, ResultsError, Session, say

NAME = "load"
HELP = "64 clients on one server: right answers, times to the first token, memory before and after"
QUESTIONS = (
    "What does a list comprehension do?",
    "Name three colours.",
    "Write a short poem about the sea, please, and then explain in one sentence what it says.",
    "hi",
)
BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/chat/completions", b'{"model": "no-such-adapter", "messages": [{"role": "user", "content": "hi"}]}', 404),
    ("/v1/chat/completions", b'{"messages": ', 400),
    (
        "/v1/chat/completions",
        b'{"model": "%b", "messages": [{"role": "user", "content": "x"}], "temperature": -1}',
        400,
    ),
    ("/v1/completions", b'{"model": "%b", "prompt": [[-5]], "max_tokens": 3}', 400),
    ("/v1/load_lora_adapter", b'{"lora_name": "evil", "lora_path": "/etc"}', 404),
    ("/v1/unload_lora_adapter", b'{"lora_name": "nobody"}', 404),
    ("/v1/nothing", b"{}", 404),
)
"""Path, body (with the base's name for %b) and the status that belongs to it."""
WARMUP = 20.0
"""Seconds before the memory is looked at for the first time."""
PERIODS = 3
"""The memory is looked at after each part of the time: what leaks grows on and on."""
SETTLE = 20.0
"""Seconds within which nothing may be left to do after the clients have gone."""


@dataclass(frozen=True)
class Target:
    """A server, and what it ought to answer.

    Attributes:
        url: of the server.
        base: what it calls its base model.
        models: the adapters by name, and the base.
        expected: (model, question) → the whole answer.
        tokens: of each answer at most.
        folder: of an adapter that clients load under names of their own.
        copied: the adapter in `models` that it is.
    """

    url: str
    base: str
    models: tuple[str, ...]
    expected: Mapping[tuple[str, str], str]
    tokens: int
    folder: Path
    copied: str


@dataclass
class Tally:
    """What happened.

    Attributes:
        done: how often each thing was done.
        wrong: answers that are not those expected, at most a few of them.
        first: seconds to the first token of streams.
        whole: seconds of whole answers.
        tokens: of all answers that came whole.
    """

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0

    def check(self, what: str, got: object, expected: object) -> None:
        """Notes an answer that is not the one expected."""
        if got != expected:
            self.done["mistaken"] += 1
            if len(self.wrong) < 10:
                self.wrong.append(f"{what}: {got!r}, not {expected!r}")


async def hammered(target: Target, tally: Tally, clients: int, seconds: float, seed: int) -> None:
    """Lets so many clients at a server for so long; each finishes what it has begun."""
    import httpx

    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=target.url, timeout=300.0, limits=limits) as http:
        await asyncio.gather(*(_client(http, target, tally, end, f"{seed}-{number}") for number in range(clients)))


async def _client(http: Any, target: Target, tally: Tally, end: float, name: str) -> None:
    chance = random.Random(name)
    doings = {_stream: 50, _answer: 15, _several: 8, _leave: 10, _wrong: 10, _load: 7}
    while time.monotonic() < end:
        doing = chance.choices([*doings], [*doings.values()])[0]
        try:
            await doing(http, target, tally, chance, name)
        except Exception as error:
            tally.check(doing.__name__, f"{type(error).__name__}: {error}", "no error")
        tally.done[doing.__name__.strip("_")] += 1


def _asked(target: Target, model: str, question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": target.tokens, **more}


async def _post(http: Any, tally: Tally, path: str, body: Mapping[str, Any]) -> Any:
    """A request's answer; one that meets a full queue is sent again after the time that the server names."""
    while True:
        answer = await http.post(path, json=body)
        if answer.status_code != 429:
            return answer
        tally.done["told to wait"] += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))


async def _answer(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    model, question = chance.choice(target.models), chance.choice(QUESTIONS)
    begun = time.monotonic()
    answer = (await _post(http, tally, "/v1/chat/completions", _asked(target, model, question))).json()
    tally.whole.append(time.monotonic() - begun)
    tally.tokens += answer["usage"]["completion_tokens"]
    tally.check(f"{model} {question!r}", answer["choices"][0]["message"]["content"], target.expected[model, question])


async def _several(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    model, question = chance.choice(target.models), chance.choice(QUESTIONS)
    body = _asked(target, model, question, n=2)
    answer = (await _post(http, tally, "/v1/chat/completions", body)).json()
    tally.tokens += answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        tally.check(f"{model} {question!r}", choice["message"]["content"], target.expected[model, question])


@asynccontextmanager
async def _streamed(http: Any, tally: Tally, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    while True:
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 429:
                yield _events(answer)
                return
            tally.done["told to wait"] += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))


async def _events(answer: Any) -> AsyncIterator[dict[str, Any]]:
    answer.raise_for_status()
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def _stream(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    model, question = chance.choice(target.models), chance.choice(QUESTIONS)
    await _read_stream(http, target, tally, model, model, question)


async def _read_stream(http: Any, target: Target, tally: Tally, model: str, like: str, question: str) -> None:
    begun, first, text, finish = time.monotonic(), None, "", None
    body = _asked(target, model, question, stream_options={"include_usage": True})
    async with _streamed(http, tally, body) as events:
        async for event in events:
            if event.get("usage"):
                tally.tokens += event["usage"]["completion_tokens"]
            for choice in event.get("choices", []):
                part = choice["delta"].get("content") or ""
                if part and first is None:
                    first = time.monotonic() - begun
                text += part
                finish = choice["finish_reason"] or finish
    if first is not None:
        tally.first.append(first)
    tally.whole.append(time.monotonic() - begun)
    tally.check(f"{model} {question!r}", text, target.expected[like, question])
    tally.check(f"{model} {question!r} ends", finish in ("stop", "length"), True)


async def _leave(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    """Goes away: in the midst of a stream, or before an answer that is not streamed."""
    body = _asked(target, chance.choice(target.models), chance.choice(QUESTIONS))
    if chance.random() < 0.5:
        pieces = chance.randrange(4)
        async with _streamed(http, tally, body) as events:
            async for _ in events:
                pieces -= 1
                if pieces < 0:
                    break
        return
    task = asyncio.create_task(http.post("/v1/chat/completions", json=body))
    await asyncio.sleep(chance.random() * 0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _wrong(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    path, body, status = chance.choice(BAD)
    content = body.replace(b"%b", target.base.encode())
    answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    tally.check(f"{path} {body!r}", answer.status_code, status)
    tally.check(f"{path} {body!r} says what is wrong", "error" in answer.text or status == 404, True)


async def _load(http: Any, target: Target, tally: Tally, chance: random.Random, name: str) -> None:
    own, question = f"own-{name}", chance.choice(QUESTIONS)
    given = {"lora_name": own, "lora_path": str(target.folder)}
    tally.check("load", (await http.post("/v1/load_lora_adapter", json=given)).status_code, 200)
    await _read_stream(http, target, tally, own, target.copied, question)
    tally.check("unload", (await http.post("/v1/unload_lora_adapter", json={"lora_name": own})).status_code, 200)
    answer = await http.post("/v1/chat/completions", json=_asked(target, own, question))
    tally.check("an unloaded adapter", answer.status_code, 404)


def settled(url: str) -> dict[str, float]:
    """The server's numbers once nothing runs or waits any more.

    Raises:
        ResultsError: something is left after some time.
    """
    end = time.monotonic() + SETTLE
    while True:
        now = numbers(url)
        if not now["lorafit_requests_running"] and not now["lorafit_requests_waiting"]:
            return now
        if time.monotonic() > end:
            raise ResultsError(f"after {SETTLE:g} s there is still something to do: {now}")
        time.sleep(0.2)


def numbers(url: str) -> dict[str, float]:
    """The metrics of a server that have no labels."""
    import httpx

    text = httpx.get(f"{url}/metrics", timeout=60.0).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


@contextmanager
def server(model: Path | str, adapters: Path, threads: int, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`lorafit serve` in a process of its own, and its address; it has to end by itself when it is asked to."""
    command = [sys.executable, "-m", "lorafit", "serve", "--model", str(model), "--adapters", str(adapters)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--allow-load", *more],
            env={**child.environment(threads), "NO_COLOR": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            url = None
            for line in process.stdout:
                found = re.search(r"http://[\w.:\[\]]+:\d+", line)
                if found:
                    url = found[0]
                    break
            if url is None:
                log.seek(0)
                raise ResultsError(f"the server did not start: {log.read()[-2000:]}")
            yield url, process
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def resident(pid: int) -> int:
    """The resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p95.

    >>> percentiles([float(value) for value in range(1, 101)])
    {'p50': 50.0, 'p95': 95.0}
    """
    ordered = sorted(seconds)
    return {f"p{share}": ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 95)}


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER / "serving"))
    parser.add_argument("--clients", type=int, default=64, help="at once")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds in which they begin something")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer at most")
    parser.add_argument("--adapters", type=int, default=16, help="of three methods")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    from lorafit.training.models import locate

    session = Session(NAME, NAME, options)
    model = locate(None, say).path
    with tempfile.TemporaryDirectory() as root:
        prepared = child.call(
            "load:prepared",
            threads=options.threads,
            model=model,
            root=root,
            adapters=options.adapters,
            tokens=options.tokens,
        )
        with server(model, Path(root), options.threads, "--max-waiting", "256") as (url, process):
            target = known(url, root, prepared, options.tokens)
            asyncio.run(hammered(target, Tally(), options.clients, WARMUP, options.seed + 1))  # what is made once
            settled(url)
            tally, memory = Tally(), [resident(process.pid)]
            for period in range(PERIODS):
                asyncio.run(hammered(target, tally, options.clients, options.duration / PERIODS, options.seed - period))
                left = settled(url)
                memory.append(resident(process.pid))
    results = {
        "model": Path(model).name,
        "clients": options.clients,
        "duration": options.duration,
        "adapters": options.adapters,
        "tokens": options.tokens,
        "done": dict(tally.done),
        "wrong": tally.wrong,
        "first_token": percentiles(tally.first),
        "whole_answer": percentiles(tally.whole),
        "tokens_per_second": tally.tokens / options.duration,
        "memory": memory,
        "left": left,
        "status": process.returncode,
    }
    print(json.dumps(results, indent=1), flush=True)
    return session.write(results)


def known(url: str, root: str, prepared: Mapping[str, Any], tokens: int) -> Target:
    """A server that has been started with what `prepared` made."""
    import httpx

    served = [each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60.0).json()["data"]]
    base = next(name for name in served if name not in prepared["answers"])
    expected = {
        (base if name == "" else name, question): text
        for name, answers in prepared["answers"].items()
        for question, text in answers.items()
    }
    first = next(name for name in prepared["answers"] if name)
    return Target(
        url, base, tuple(dict.fromkeys(name for name, _ in expected)), expected, tokens, Path(root) / first, first
    )


def prepared(model: str, root: str, adapters: int, tokens: int, threads: int) -> dict[str, Any]:
    """Adapters in a folder, and what each of them answers alone, by transformers' `generate`; "" is the base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lorafit as lf

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    methods = (lf.LoRA(r=4), lf.DoRA(lf.LoRA(r=8)), lf.VeRA(r=64), lf.LoRA(r=16))
    answers = {"": _answers(base, tokenizer, tokens)}
    for number in range(adapters):
        handle = lf.attach(base, methods[number % len(methods)], seed=number)
        noise = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in handle.named_parameters():
                drawn = torch.randn(parameter.shape, generator=noise) * 0.02
                parameter.copy_(parameter + drawn if key.endswith((".m", ".d")) else drawn)
        name = f"adapter-{number}"
        handle.save(Path(root) / name, base_model=model, task_type="CAUSAL_LM")
        answers[name] = _answers(base, tokenizer, tokens)
        handle.detach()
    different = len({json.dumps(each) for each in answers.values()})
    assert different > 1, "all adapters answer alike: nothing would be tested"
    return {"answers": answers, "different": different}


def _answers(model: Any, tokenizer: Any, tokens: int) -> dict[str, str]:
    import torch

    found = {}
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found[question] = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found
