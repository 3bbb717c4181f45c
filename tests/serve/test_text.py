"""The text of an answer while it is written."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.serve.text import HELD, UNKNOWN, Answer, Decoder, Stops

TEXTS = (
    "plain words, and a line\nand another",
    "Grüße: żółć, ένα δύο, 東京タワー, 한국어",
    "👩‍👩‍👧 family, 🇩🇪 flag, é combined, \u200d joiner",
    " leading and trailing  ",
    "",
)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Pieces of words with their space in front, and bytes for what has no piece, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁and", "▁a", *"abcdefghijklmnopqrstuvwxyz,:.", "▁w", "ord"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "w")], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


@pytest.fixture(params=["bytes", "metaspace"])
def tokenizer(request, tiny, metaspace):
    return tiny[1] if request.param == "bytes" else metaspace


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_are_whole_characters_and_together_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoder = Decoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    assert not any(UNKNOWN in piece for piece in pieces)
    assert decoder.rest() == ""
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_any_tokens_give_what_they_give_together(tokenizer):
    numbers = random.Random(0)
    for _ in range(300):
        ids = [numbers.randrange(len(tokenizer)) for _ in range(numbers.randrange(1, 5))]
        decoder, whole = Decoder(tokenizer), tokenizer.decode(ids, skip_special_tokens=True)
        told = "".join(map(decoder.add, ids)) + decoder.rest()
        # Bytes that make no character take others of their run with them, where a tokenizer falls back to bytes.
        assert told == whole or (UNKNOWN in told and UNKNOWN in whole and len(told) == len(whole))


def test_special_tokens_have_no_text_and_are_not_collected(tiny):
    tokenizer = tiny[1]
    end, letter = tokenizer.eos_token_id, tokenizer("x").input_ids[0]
    decoder = Decoder(tokenizer)
    assert [decoder.add(token) for token in (end, letter, end, letter)] == ["", "x", "", "x"]
    assert [decoder.add(end) for _ in range(500)] == [""] * 500
    assert len(decoder._ids) <= HELD + 1
    assert decoder.add(letter) == "x"


def test_bytes_that_make_no_character_are_not_held_forever(tiny):
    tokenizer = tiny[1]
    lone = tokenizer.convert_tokens_to_ids("Ģ")  # 0x80: goes on with a character that never began
    decoder = Decoder(tokenizer)
    pieces = [decoder.add(lone) for _ in range(100)]
    assert "".join(pieces) + decoder.rest() == UNKNOWN * 100
    assert len(decoder._ids) <= 2 * HELD


def test_half_a_character_at_the_end_is_told_at_the_end(tiny):
    tokenizer = tiny[1]
    ids = tokenizer("a東").input_ids[:-1]
    decoder = Decoder(tokenizer)
    assert [decoder.add(token) for token in ids] == ["a", "", ""]
    assert decoder.rest() == UNKNOWN


@pytest.mark.parametrize(
    ("stops", "parts", "told", "stopped"),
    [
        (("END",), ["abc"], ["abc"], False),
        (("END",), ["abE", "N", "Dx"], ["ab", "", ""], True),
        (("END",), ["abE", "N", "X"], ["ab", "", "ENX"], False),
        (("END",), ["EE", "ND"], ["E", ""], True),
        (("aab",), ["aaa", "b"], ["a", ""], True),
        (("\n\n", "stop"), ["one\n", "two", "\n", "\nthree"], ["one", "\ntwo", "", ""], True),
        (("later", "first"), ["xx first later"], ["xx "], True),
        (("abcd", "bc"), ["ab", "c"], ["", "a"], True),
        (("abcd", "bc"), ["ab", "d"], ["", "abd"], False),
        (("東京",), ["x東", "京y"], ["x", ""], True),
        (("x",), ["x"], [""], True),
    ],
)
def test_stop_strings(stops, parts, told, stopped):
    found = Stops(stops)
    results = [found.add(part) for part in parts]
    assert [text for text, _ in results] == told
    assert [end for _, end in results] == [False] * (len(parts) - 1) + [stopped]


def test_stop_strings_at_any_cut_of_any_text():
    numbers = random.Random(1)
    for _ in range(2000):
        text = "".join(numbers.choices("ab", k=numbers.randrange(12)))
        stops = tuple("".join(numbers.choices("ab", k=numbers.randrange(1, 5))) for _ in range(numbers.randrange(3)))
        held, told, stopped, at = Stops(stops), "", False, 0
        while at < len(text) and not stopped:
            cut = at + numbers.randrange(1, 4)
            piece, stopped = held.add(text[at:cut])
            told, at = told + piece, cut
        told += "" if stopped else held.rest()
        # The one that is complete first; of two, the longer one.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert (stopped, told) == ((True, text[: min(ends)[1]]) if ends else (False, text)), (text, stops)


def test_a_stop_string_inside_of_a_token_and_across_characters(tiny):
    tokenizer = tiny[1]
    for text, stop, expected in (
        ("one\n\ntwo", "\ntwo", "one\n"),  # two line breaks are one token
        ("naïve 東京 x", "京 ", "naïve 東"),
        ("żółw", "ółw", "ż"),
    ):
        answer, told, stopped = Answer(tokenizer, [stop]), "", False
        for token in tokenizer(text).input_ids:
            if not stopped:
                piece, stopped = answer.add(token)
                told += piece
        assert stopped and told == expected


def test_the_rest_may_complete_a_stop_string(tiny):
    tokenizer = tiny[1]
    answer = Answer(tokenizer, [f"a{UNKNOWN}"])
    ids = tokenizer("xa東").input_ids[:-1]
    assert "".join(answer.add(token)[0] for token in ids) == "x"
    assert answer.rest() == ("", True)
    other = Answer(tokenizer, ["ab"])
    assert other.add(ids[1]) == ("", False) and other.rest() == ("a", False)
