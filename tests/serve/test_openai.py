"""OpenAI's own client, as it is, against a scripted engine and against the real one."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafit as lf
from lorafit.serve.bank import AdapterBank
from lorafit.serve.engine import Engine, Limits
from lorafit.serve.requests import Finish, Piece
from tests.serve.http_fixtures import BASE, Script, Server, Start, starter, until

openai = pytest.importorskip("openai")

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


@pytest.fixture
def clients() -> Iterator[Any]:
    """Makes clients of servers, which are closed at the end."""
    made: list[Any] = []

    def client(server: Server, key: str = "unused", **settings: Any) -> Any:
        settings.setdefault("max_retries", 0)
        made.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=20, **settings))
        return made[-1]

    yield client
    for one in made:
        one.close()


def test_models(start: Start, clients: Any) -> None:
    client = clients(start())
    assert [model.id for model in client.models.list()] == [BASE, "dora", "lora", "small", "vera"]
    card = client.models.retrieve("lora")
    assert card.object == "model" and card.owned_by == "lorafit"
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found" and caught.value.request_id.startswith("req-")


def test_a_conversation(start: Start, clients: Any) -> None:
    made = clients(start()).chat.completions.create(
        model="lora", messages=HELLO, temperature=0.5, seed=1, stop=["x"], max_tokens=20
    )
    assert made.choices[0].message.content == "I am lora." and made.choices[0].finish_reason == "stop"
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    again = clients(start()).chat.completions.create(
        model="lora", messages=[*HELLO, made.choices[0].message, *HELLO], max_completion_tokens=1
    )
    assert again.choices[0].finish_reason == "length", "its own answers can be sent back as they are"


def test_streams(start: Start, clients: Any) -> None:
    client = clients(start())
    chunks = list(client.chat.completions.create(model="lora", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I am lora."
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(
            model="lora", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == 8 and not chunks[-1].choices
    with client.chat.completions.stream(model="lora", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == "I am lora."


def test_a_stream_that_is_closed_ends_the_request(start: Start, clients: Any) -> None:
    import itertools
    import time

    server = start(
        Script(lambda asked: ("a" for _ in itertools.takewhile(lambda _: not time.sleep(0.01), iter(int, 1))))
    )
    stream = clients(server).chat.completions.create(model=BASE, messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: server.engine.tickets[0].cancelled.is_set())


@pytest.mark.parametrize("prompt", ["ab", ["ab", "c"], [65, 66], [[65], [66, 67]]], ids=str)
def test_completions(start: Start, clients: Any, prompt: Any) -> None:
    client = clients(start())
    made = client.completions.create(model="lora", prompt=prompt)
    count = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    assert [choice.text for choice in made.choices] == ["I am lora."] * count
    chunks = list(client.completions.create(model="lora", prompt=prompt, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == 0) == "I am lora."


def test_errors_are_its_own(start: Start, clients: Any) -> None:
    server = start(key="right")
    client = clients(server, "right")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        clients(server, "wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="logprobs") as bad:
        client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True)
    assert bad.value.param == "logprobs" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body={"top_k": 3})
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_lora_adapter", body={"lora_name": "a", "lora_path": "b"}, cast_to=str)
    server.engine.full = True
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model=BASE, messages=HELLO)
    assert busy.value.response.headers["retry-after"] == "1"


def test_errors_of_answers(start: Start, clients: Any) -> None:
    failing = clients(start(Script(lambda asked: ["a", Piece("", 1, Finish.FAILED, "broken")])))
    with pytest.raises(openai.InternalServerError, match="req-"):
        failing.chat.completions.create(model=BASE, messages=HELLO)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(failing.chat.completions.create(model=BASE, messages=HELLO, stream=True))
    server = start(Script(lambda asked: [Piece("", 0, Finish.TIMEOUT)]))
    with pytest.raises(openai.InternalServerError, match="time limit"):
        clients(server, max_retries=5).chat.completions.create(model=BASE, messages=HELLO)
    assert len(server.engine.asked) == 1, "what took too long is not asked again"


def test_who_is_turned_away_comes_again(start: Start, clients: Any) -> None:
    class Soon(Script):
        def submit(self, asked: Any, notify: Any) -> Any:
            self.full, self.tries = self.tries == 0, self.tries + 1
            return super().submit(asked, notify)

        tries = 0

    made = clients(start(Soon()), max_retries=2).chat.completions.create(model=BASE, messages=HELLO)
    assert made.choices[0].message.content == f"I am {BASE}."


def test_many_at_once(start: Start) -> None:
    server = start()

    async def ask(client: Any, model: str) -> str:
        made = await client.chat.completions.create(model=model, messages=HELLO)
        return str(made.choices[0].message.content)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, model) for model in [BASE, "lora", "dora"] * 10))

    assert asyncio.run(all_of_them()) == [f"I am {model}." for model in [BASE, "lora", "dora"] * 10]


def test_the_example_of_the_documentation(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start()
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```py\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:8000", server.url).replace('"demo"', '"lora"'), names)
    names["client"].close()
    assert capsys.readouterr().out == "I am lora."


# The real engine ---------------------------------------------------------------


@pytest.fixture
def real(tiny: tuple[Any, Any], start: Start) -> Iterator[Server]:
    model = copy.deepcopy(tiny[0])
    bank = AdapterBank(model)
    engine = Engine(model, bank, Limits(rows=4, waiting=8))
    engine.start()
    yield start(engine, bank, load=True)
    engine.stop(wait=0.0)


def plainly(tiny: tuple[Any, Any], adapter: Path | None, server: Server, tokens: int) -> str:
    """What transformers' own `generate` writes to the same question."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    if adapter is not None:
        lf.load(model, adapter)
    voice = server.voices.of(None)
    from lorafit.training.examples import Turn

    ids = torch.tensor([voice.prompt([Turn("user", "Hello")])])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(voice.ends),
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("name", [BASE, "lora", "small", "dora", "vera"])
def test_the_engine_answers_as_the_model_alone_does(
    real: Server, clients: Any, tiny: tuple[Any, Any], adapters: Path, name: str
) -> None:
    expected = plainly(tiny, None if name == BASE else adapters / name, real, 12)
    client = clients(real)
    made = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=12)
    assert made.choices[0].message.content == expected
    chunks = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_adapters_share_a_batch(real: Server, tiny: tuple[Any, Any], adapters: Path) -> None:
    names = [BASE, "lora", "small", "dora", "vera", "lora", BASE, "vera"]
    expected = {name: plainly(tiny, None if name == BASE else adapters / name, real, 16) for name in set(names)}

    async def ask(client: Any, model: str) -> str:
        made = await client.chat.completions.create(model=model, messages=HELLO, temperature=0, max_tokens=16)
        return str(made.choices[0].message.content)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, model) for model in names))

    assert asyncio.run(all_of_them()) == [expected[name] for name in names]
    assert len(set(expected.values())) > 1, "the adapters do something"


def test_the_same_seed_gives_the_same_answer(real: Server, clients: Any) -> None:
    client = clients(real)

    def draw(seed: int) -> str:
        made = client.completions.create(model="lora", prompt="a", seed=seed, temperature=1.5, max_tokens=20)
        return str(made.choices[0].text)

    assert draw(1) == draw(1) and len({draw(seed) for seed in range(5)}) > 1


def test_an_adapter_that_comes_and_goes(real: Server, clients: Any, tiny: tuple[Any, Any], adapters: Path) -> None:
    client = clients(real)
    said = client.post("/load_lora_adapter", body={"lora_name": "new", "lora_path": "dora"}, cast_to=str)
    assert "added successfully" in said
    made = client.chat.completions.create(model="new", messages=HELLO, temperature=0, max_tokens=12)
    assert made.choices[0].message.content == plainly(tiny, adapters / "dora", real, 12)
    client.post("/unload_lora_adapter", body={"lora_name": "new"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="new", messages=HELLO)


def test_a_prompt_that_fills_the_context(real: Server, clients: Any) -> None:
    client = clients(real)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="x" * 512)
    assert caught.value.code == "context_length_exceeded"
    made = client.completions.create(model=BASE, prompt="x" * 508, max_tokens=50, temperature=0)
    assert made.usage.total_tokens <= 512 and made.choices[0].finish_reason in ("length", "stop")
