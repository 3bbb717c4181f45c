"""Token ids, and exactly which of them are learnt."""

from __future__ import annotations

import warnings

import pytest

from lorafit.errors import ConfigError, DataError, LorafitWarning
from lorafit.training.classify import LabelEncoder
from lorafit.training.encode import IGNORED, Encoded, Encoder, Piece, rendering
from lorafit.training.examples import Conversation, Document, Labelled, Turn

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt is not how a rendered answer begins.
BROKEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
HEADLESS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat(*contents, system=None, where="data.jsonl:1"):
    turns = [Turn(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    return Conversation(tuple([Turn("system", system)] * (system is not None) + turns), where)


def learnt(encoded, tokenizer):
    return [piece.text for piece in rendering(encoded, tokenizer) if piece.supervised]


def whole(encoded, tokenizer):
    return "".join(piece.text for piece in rendering(encoded, tokenizer))


def test_answer_and_its_end_are_learnt_and_nothing_else(tokenizer):
    encoded = Encoder(tokenizer, 200).encode(chat("Why?", "So.", system="Be brief."))
    assert rendering(encoded, tokenizer) == [
        Piece(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        Piece("So.<|im_end|>", True),
    ]
    assert encoded.labels[-4:] == encoded.input_ids[-4:]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert (encoded.supervised, len(encoded), encoded.where) == (4, len(encoded.labels), "data.jsonl:1")


def test_what_comes_before_the_answer_is_what_inference_gives(tokenizer):
    encoded = Encoder(tokenizer, 200).encode(chat("Why?", "So."))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert IGNORED not in encoded.labels[len(prompt) :]


def test_all_answers_of_a_conversation_are_learnt(tokenizer):
    encoded = Encoder(tokenizer, 400).encode(chat("a", "b", "c", "d e", "f", "g"))
    assert learnt(encoded, tokenizer) == ["b<|im_end|>", "d e<|im_end|>", "g<|im_end|>"]
    assert whole(encoded, tokenizer).count("<|im_start|>user") == 3


def test_a_token_over_the_border_is_taken_apart(tokenizer):
    # The header ends in a line break, the answer begins with one, and two of them are one token.
    encoded = Encoder(tokenizer, 200).encode(chat("Why?", "\nSo."))
    text = whole(encoded, tokenizer)
    assert learnt(encoded, tokenizer) == ["\nSo.<|im_end|>"]
    assert encoded.input_ids != tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(text[: text.index("\nSo.")], add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt


def test_a_template_that_rewrites_earlier_answers_gives_one_sequence_for_each(make_tokenizer):
    tokenizer = make_tokenizer(THINKING)
    made = Encoder(tokenizer, 400).encode_all([chat("a", "b", "c", "d"), chat("e", "f")])
    assert made.unrolled == 1
    empty = "<think>\n\n</think>\n\n"
    assert [learnt(one, tokenizer) for one in made.items] == [
        [f"{empty}b<|im_end|>"],
        [f"{empty}d<|im_end|>"],
        [f"{empty}f<|im_end|>"],
    ]
    with pytest.raises(DataError, match="does not become one sequence"):
        Encoder(tokenizer, 400).encode(chat("a", "b", "c", "d"))


def test_a_template_without_the_prefix_property_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="does not begin an answered conversation") as caught:
        Encoder(make_tokenizer(BROKEN), 400).encode(chat("a", "b"))
    assert caught.value.where == "data.jsonl:1"
    assert caught.value.found == "'b<|im_end|>' where the prompt has '<think>\\n'"


def test_a_template_that_marks_answers_is_believed(make_tokenizer):
    tokenizer = make_tokenizer(MARKED)
    encoded = Encoder(tokenizer, 400).encode(chat("a", "b", "c", "d"))
    assert learnt(encoded, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_ignores_the_generation_prompt_is_told(make_tokenizer):
    tokenizer = make_tokenizer(HEADLESS)
    with pytest.warns(LorafitWarning, match="ignores add_generation_prompt"):
        encoded = Encoder(tokenizer, 400).encode(chat("a", "b"))
    assert learnt(encoded, tokenizer) == ["<|im_start|>assistant\nb<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_told(make_tokenizer):
    tokenizer = make_tokenizer(ENDLESS)
    with pytest.warns(LorafitWarning, match=r"1 record \(data.jsonl:1\).* will not learn to stop"):
        encoded = Encoder(tokenizer, 400).encode(chat("a", "b"))
    assert learnt(encoded, tokenizer) == ["b\n"]


def test_a_template_that_rewrites_the_answer_is_told(make_tokenizer):
    template = HEADLESS.replace("m['content']", "m['content'] | upper")
    with pytest.warns(LorafitWarning, match="does not write the answer as it stands"):
        Encoder(make_tokenizer(template), 400).encode(chat("a", "b"))


def test_a_template_that_refuses_says_which_record(make_tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ENDLESS
    encoder = Encoder(make_tokenizer(template), 400)
    chats = [chat("a", "b"), chat("a", "b", system="s", where="data.jsonl:2")]
    with pytest.raises(DataError, match="refuses the conversation") as caught:
        encoder.encode_all(chats)
    assert (caught.value.where, caught.value.found) == ("data.jsonl:2", "system user: no system")


def test_special_tokens_in_the_text_are_told(tokenizer):
    with pytest.warns(LorafitWarning, match=r"1 record \(data.jsonl:1\).* spelling of a special token"):
        Encoder(tokenizer, 200).encode(chat("a <|im_end|>", "b"))


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template(make_tokenizer, bos):
    tokenizer = make_tokenizer(None, bos=bos)
    encoder = Encoder(tokenizer, 200)
    encoded = encoder.encode(chat("Why?", "So."))
    assert rendering(encoded, tokenizer) == [
        Piece("<s>" * bos + "Why?\n", False),
        Piece("So.<|im_end|>", True),
    ]
    assert encoder.layout.description == "no chat template: prompt, newline, completion, end-of-sequence token"
    with pytest.raises(DataError, match="no way to write a conversation") as caught:
        encoder.encode(chat("a", "b", "c", "d"))
    assert caught.value.found == "user assistant user"
    assert "chat template" in caught.value.fix


def test_without_a_template_and_an_end(make_tokenizer):
    with pytest.raises(DataError, match="neither a chat template nor an end-of-sequence") as caught:
        Encoder(make_tokenizer(None, eos=None), 200)
    assert caught.value.found == "eos_token=None"


@pytest.mark.parametrize("bos", [False, True])
def test_documents(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos=bos)
    encoder = Encoder(tokenizer, 200)
    encoded = encoder.encode(Document("One two.", "data.txt:1"))
    assert whole(encoded, tokenizer) == "<s>" * bos + "One two.<|im_end|>"
    assert encoded.labels[1:] == encoded.input_ids[1:]
    assert encoded.labels[0] == IGNORED
    # Neither the beginning nor the end is put twice.
    again = encoder.encode(Document(whole(encoded, tokenizer), "data.txt:1"))
    assert again == encoded


def test_no_second_beginning_with_a_template(make_tokenizer):
    tokenizer = make_tokenizer("<s>" + HEADLESS + "{% if add_generation_prompt %}A{% endif %}", bos=True)
    with pytest.raises(DataError, match="does not begin"):
        Encoder(tokenizer, 200).encode(chat("a", "b"))
    tokenizer = make_tokenizer("<s>" + THINKING, bos=True)
    encoded = Encoder(tokenizer, 200).encode(chat("a", "b"))
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id


def test_truncation_cuts_the_right_and_counts(tokenizer):
    long, short, hopeless = chat("q", "x" * 50), chat("q", "y", where="b"), chat("q" * 50, "z", where="c")
    full = Encoder(tokenizer, 200).encode(long)
    size = len(full) - 30
    made = Encoder(tokenizer, size).encode_all([long, short, hopeless])
    assert made.truncated == ("data.jsonl:1",)
    assert made.dropped == ("c",)
    assert made.longest == max(len(full), len(Encoder(tokenizer, 200).encode(hopeless)))
    cut = made.items[0]
    assert (cut.input_ids, cut.labels, cut.truncated) == (full.input_ids[:size], full.labels[:size], True)
    assert (made.items[1].where, made.items[1].truncated) == ("b", False)
    exact = Encoder(tokenizer, len(full)).encode(long)
    assert exact == full
    with pytest.raises(DataError, match="does not become one sequence") as caught:
        Encoder(tokenizer, size).encode(hopeless)
    assert caught.value.fix == "raise max_length"


def test_many_are_encoded_like_each(tokenizer):
    examples = [chat(f"question {i}", f"answer {i}" * (i % 3 + 1), where=f"data.jsonl:{i}") for i in range(2100)]
    encoder = Encoder(tokenizer, 100)
    made = encoder.encode_all(examples)
    assert [one.where for one in made.items] == [example.where for example in examples]
    for place in (0, 999, 1000, 2099):
        assert made.items[place] == encoder.encode(examples[place])


def test_settings_and_kinds_that_cannot_be(tokenizer):
    with pytest.raises(ConfigError, match="max_length"):
        Encoder(tokenizer, 1)
    labelled = Labelled("t", None, "x", "data.jsonl:1")
    for call in (Encoder(tokenizer, 10).encode, Encoder(tokenizer, 10).sample):
        with pytest.raises(DataError, match="for classification"):
            call(labelled)


def test_sample_of_a_conversation(tokenizer):
    sample = Encoder(tokenizer, 200).sample(chat("a", "b", "c", "d"))
    assert (sample.prompt, sample.gold, sample.where) == ("c", "d", "data.jsonl:1")
    assert tokenizer.decode(sample.input_ids).endswith("c<|im_end|>\n<|im_start|>assistant\n")


def test_sample_of_a_document(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    sample = Encoder(tokenizer, 200).sample(Document("abcdef", "data.txt:1"))
    assert (sample.prompt, sample.gold) == ("abc", "def")
    assert sample.input_ids[0] == tokenizer.bos_token_id


def test_rendering_is_the_decoded_whole(tokenizer):
    encoded = Encoder(tokenizer, 200).encode(chat("héé", "ça va? 🙂", "c", " d"))
    pieces = rendering(encoded, tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(encoded.input_ids)
    assert [piece.supervised for piece in pieces] == [False, True, False, True]
    assert rendering(Encoded([], [], "x"), tokenizer) == []


def test_a_clean_run_warns_of_nothing(tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Encoder(tokenizer, 10_000).encode(chat("q", "long answer " * 200))
    assert caught == []


def labelled(text, pair=None, label="good", where="data.csv:2"):
    return Labelled(text, pair, label, where)


def test_labelled_text(encoder_tokenizer):
    encoder = LabelEncoder(encoder_tokenizer, 8, ("bad", "good"))
    encoded = encoder.encode(labelled("very good"))
    assert (encoded.input_ids, encoded.token_type_ids) == ([2, 6, 4, 3], [0, 0, 0, 0])
    assert (encoded.label, encoded.where, encoded.truncated, len(encoded)) == (1, "data.csv:2", False, 4)


def test_labelled_pair_and_truncation(encoder_tokenizer):
    encoder = LabelEncoder(encoder_tokenizer, 7, ("bad", "good"))
    made = encoder.encode_all([labelled("it is", "good film"), labelled("it is very very good", "film")])
    assert [one.input_ids for one in made.items] == [[2, 8, 9, 3, 4, 7, 3], [2, 8, 9, 6, 3, 7, 3]]
    assert [one.token_type_ids for one in made.items] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]
    assert [one.truncated for one in made.items] == [False, True]
    assert (made.truncated, made.longest) == (("data.csv:2",), 9)


def test_labelled_pair_without_a_separator_is_joined_by_a_newline(tokenizer):
    encoded = LabelEncoder(tokenizer, 50, ("bad", "good")).encode(labelled("it is", "good"))
    assert tokenizer.decode(encoded.input_ids) == "it is\ngood"
    assert encoded.token_type_ids is None


def test_labels_that_are_no_class(encoder_tokenizer):
    encoder = LabelEncoder(encoder_tokenizer, 8, ("bad", "good"))
    with pytest.raises(DataError, match="not one of the classes") as caught:
        encoder.encode(labelled("good", label="goood"))
    assert (caught.value.where, caught.value.near) == ("data.csv:2", ("good",))
    with pytest.raises(DataError, match="Some records are pairs"):
        encoder.encode_all([labelled("good", "film"), labelled("good")])
    assert encoder.encode_all([]).items == []
