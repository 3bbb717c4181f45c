"""Prompts of the server are those of training, with the tokenizer that a model brings."""

from __future__ import annotations

import copy
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorafit import CheckpointError, DataError
from lorafit.serve.names import Folders, UnknownAdapterError
from lorafit.serve.templates import NoTemplateError, Voice, Voices
from lorafit.training.encode import Encoder
from lorafit.training.examples import Conversation, Turn

CHAT = (Turn("system", "be short"), Turn("user", "one?"), Turn("assistant", "1"), Turn("user", "two?"))


@pytest.fixture
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return copy.deepcopy(tiny[1])


@pytest.fixture
def voice(tokenizer: Any) -> Voice:
    return Voice(tokenizer, (), len(tokenizer))


def test_a_conversation_is_written_as_in_training(voice: Voice, tokenizer: Any) -> None:
    ids = voice.prompt(CHAT)
    learnt = Encoder(tokenizer, 500).encode(Conversation((*CHAT, Turn("assistant", "2")), "here"))
    assert learnt.input_ids[: len(ids)] == ids
    assert tokenizer.decode(learnt.input_ids[len(ids) :]) == "2<|im_end|>"


def test_a_text_is_begun_as_in_training(voice: Voice, tokenizer: Any) -> None:
    assert voice.text("abc") == tokenizer("abc")["input_ids"]


def test_a_token_at_the_beginning(tokenizer: Any) -> None:
    from tokenizers import processors

    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", start)]
    )
    voice = Voice(tokenizer, (), len(tokenizer))
    plain = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert voice.text("abc") == [start, *plain]
    assert voice.text("<|im_start|>abc") == [start, *plain], "never twice"
    assert voice.text("") == [start], "an empty text begins somewhere"


def test_what_ends_an_answer(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Voice(tokenizer, (3,), len(tokenizer)).ends == (3, end)
    # A base whose end of text is not the end of a turn: training taught the model the latter.
    tokenizer.eos_token = "<|im_start|>"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert set(Voice(tokenizer, (), len(tokenizer)).ends) == {start, end}
    tokenizer.chat_template = None
    assert Voice(tokenizer, (), len(tokenizer)).ends == (start,)


def test_without_a_template_there_is_one_question(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    voice = Voice(tokenizer, (), len(tokenizer))
    assert voice.prompt([Turn("user", "one?")]) == tokenizer("one?\n")["input_ids"]
    with pytest.raises(NoTemplateError, match="no chat template"):
        voice.prompt(CHAT)


def test_what_a_template_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    voice = Voice(tokenizer, (), len(tokenizer))
    with pytest.raises(DataError, match="refuses") as caught:
        voice.prompt(CHAT)
    assert "no system" in str(caught.value)


def test_a_conversation_without_a_question(voice: Voice) -> None:
    with pytest.raises(DataError, match="nothing to answer"):
        voice.prompt([Turn("system", "be short")])


def test_tokens_that_the_model_does_not_know(voice: Voice, tokenizer: Any) -> None:
    known = len(tokenizer)
    assert voice.ids([0, known - 1]) == [0, known - 1]
    for ids, odd in (([0, known], known), ([-1, 0], -1)):
        with pytest.raises(DataError, match="does not know") as caught:
            voice.ids(ids)
        assert caught.value.found == odd
    with pytest.raises(DataError, match="empty"):
        voice.text("")
    with pytest.raises(DataError, match="does not know"):
        Voice(tokenizer, (), 5).text("zzz")


def test_many_threads_at_once(voice: Voice) -> None:
    expected = voice.prompt(CHAT), voice.text("abc")
    wrong: list[object] = []

    def work() -> None:
        for _ in range(50):
            try:
                made = voice.prompt(CHAT), voice.text("abc")
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([made] if made != expected else [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Adapters ----------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders([tmp_path], base="base")
    for name in ("plain", "own", "same"):
        (tmp_path / name).mkdir()
        made.keep(name, tmp_path / name)
    return made


@pytest.fixture
def voices(tokenizer: Any, folders: Folders) -> Voices:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    for name in ("own", "same"):
        own.save_pretrained(folders.folder(name))
    return Voices(tokenizer, folders, ends=(), vocabulary=len(tokenizer), kept=1)


def test_an_adapter_reads_as_its_base_unless_it_has_a_tokenizer(voices: Voices) -> None:
    assert voices.of("plain") is voices.of(None)
    own = voices.of("own")
    assert own.tokenizer.decode(own.prompt([Turn("user", "one?")])) == "[one?]>"
    assert voices.of("same") is own, "the same files are loaded once"


def test_nobody_by_that_name(voices: Voices) -> None:
    with pytest.raises(UnknownAdapterError):
        voices.of("nobody")


def test_only_so_many_are_kept(voices: Voices, folders: Folders, tokenizer: Any) -> None:
    own = voices.of("own")
    tokenizer.chat_template = "other {{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folders.folder("plain"))
    other = voices.of("plain")
    assert other.tokenizer.chat_template != own.tokenizer.chat_template
    assert voices.of("own") is not own, "it made room, and is read again"


def test_what_comes_later_by_the_same_name_is_read_anew(voices: Voices, folders: Folders, tokenizer: Any) -> None:
    before = voices.of("own")
    tokenizer.chat_template = "new {{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folders.folder("own"))
    assert voices.of("own") is before
    voices.forget("own")
    voices.forget("own")
    assert "new" in voices.of("own").tokenizer.chat_template


def test_a_damaged_tokenizer(voices: Voices, folders: Folders) -> None:
    for path in folders.folder("own").glob("tokenizer*.json"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        voices.of("own")


def test_code_that_comes_with_an_adapter_is_not_run(voices: Voices, folders: Folders) -> None:
    folder = folders.folder("own")
    marker = folder / "ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    with suppress(CheckpointError):
        voices.of("own")
    assert not marker.exists()
