"""Repetitions among records, and held-out records that training has seen: exactly, and nearly.

Exact comparisons are of digests, so that memory is a few bytes for each record. Near ones are by MinHash
(`datasketch`, an optional package) over runs of three words, and each pair that it proposes is compared in full: the
share of common runs (Jaccard) has to be at least `NEAR`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, final

from lorafit.training.examples import Conversation, Document, Example, Labelled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR = 0.8
"""Share of common runs of words from which on two texts are nearly the same."""
MOST = 100_000
"""Records that are compared nearly at most; of more, so many are chosen evenly, and it is said."""
_PERMUTATIONS = 64
_PROPOSED = 0.65  # below NEAR, because sketches miss pairs near their bound; what they propose is compared in full
_RUN = 3
_CANDIDATES = 8  # proposals that are compared in full for one record
_MARKS = str.maketrans(dict.fromkeys(f"{string.punctuation}«»„“”‘’…–—¿¡、。！？，；：「」『』", " "))
_LONG = 40  # characters from which on two equal answers are no coincidence
# Scripts that put no spaces between words count character by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@final
@dataclass(frozen=True)
class Repeats:
    """Where records of one set repeat earlier ones.

    Attributes:
        whole: the whole record was there before.
        question: the question was, and another answer.
        alike: the question was, but for case, punctuation and spaces.
    """

    whole: tuple[str, ...]
    question: tuple[str, ...]
    alike: tuple[str, ...]


@final
@dataclass(frozen=True)
class Leaks:
    """Where held-out records are that training has as well.

    Attributes:
        whole: the whole record.
        question: its question, with another answer.
        alike: its question, but for case, punctuation and spaces.
        answer: its answer, where that is long and the question is another.
    """

    whole: tuple[str, ...]
    question: tuple[str, ...]
    alike: tuple[str, ...]
    answer: tuple[str, ...]


@final
@dataclass(frozen=True)
class Near:
    """Records that are nearly the same.

    Attributes:
        repeats: (a training record, an earlier one).
        leaks: (a training record, a held-out one).
        compared: how many training records were compared.
    """

    repeats: tuple[tuple[str, str], ...]
    leaks: tuple[tuple[str, str], ...]
    compared: int


def parts(example: Example) -> tuple[str, str]:
    """The question and the answer of an example, as text; a document is all answer."""
    if isinstance(example, Conversation):
        return "\n".join(turn.content for turn in example.turns[:-1]), example.turns[-1].content
    if isinstance(example, Document):
        return "", example.text
    assert isinstance(example, Labelled)
    return f"{example.text}\n{example.pair or ''}", str(example.label)


def body(example: Example) -> str:
    """The text that is compared nearly: all turns, the document, or the labelled text without its label."""
    question, answer = parts(example)
    return question if isinstance(example, Labelled) else f"{question}\n{answer}"


def compare(
    train: Sequence[Example], held: Sequence[Example] = (), removed: Sequence[Example] = ()
) -> tuple[Repeats, Leaks]:
    """Which training examples repeat earlier ones, and which held-out ones training has as well.

    Args:
        train: to learn from.
        held: held out.
        removed: what was taken out of training already, because its questions are held out.
    """
    seen = _Seen()
    repeated = _Sorted()
    for example in train:
        marks = _Marks.of(example)
        seen.sort(marks, example.where, repeated)
        seen.add(marks)
    for example in removed:
        seen.add(_Marks.of(example))
    leaked, answered = _Sorted(), list[str]()
    for example in held:
        marks = _Marks.of(example)
        if not seen.sort(marks, example.where, leaked) and seen.answered(marks):
            answered.append(example.where)
    repeats = Repeats(tuple(repeated.whole), tuple(repeated.question), tuple(repeated.alike))
    return repeats, Leaks(tuple(leaked.whole), tuple(leaked.question), tuple(leaked.alike), tuple(answered))


@dataclass
class _Sorted:
    whole: list[str] = field(default_factory=list)
    question: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)


class _Marks(NamedTuple):
    """Digests of an example: of the record, of the question, of its words, and of the words of a long answer."""

    whole: bytes
    question: bytes
    alike: bytes
    answer: bytes | None

    @classmethod
    def of(cls, example: Example) -> _Marks:
        asked, answer = parts(example)
        question = _digest(repr(example.question()))
        long = isinstance(example, Conversation) and len(answer) >= _LONG
        return cls(
            _digest(f"{question.hex()}{answer}"),
            question,
            _folded(asked or answer),
            _folded(answer) if long else None,
        )


@final
class _Seen:
    """Digests of what was there before."""

    def __init__(self) -> None:
        self._whole: set[bytes] = set()
        self._question: set[bytes] = set()
        self._alike: set[bytes] = set()
        self._answer: set[bytes] = set()

    def add(self, marks: _Marks) -> None:
        self._whole.add(marks.whole)
        self._question.add(marks.question)
        self._alike.add(marks.alike)
        if marks.answer is not None:
            self._answer.add(marks.answer)

    def sort(self, marks: _Marks, where: str, into: _Sorted) -> bool:
        """Puts the place of an example where it belongs, if it was there before."""
        if marks.whole in self._whole:
            into.whole.append(where)
        elif marks.question in self._question:
            into.question.append(where)
        elif marks.alike in self._alike:
            into.alike.append(where)
        else:
            return False
        return True

    def answered(self, marks: _Marks) -> bool:
        return marks.answer in self._answer


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _folded(text: str) -> bytes:
    """The digest of the words alone; of a text without words, of the text."""
    return _digest(" ".join(text.casefold().translate(_MARKS).split()) or text)


# Near -------------------------------------------------------------------------


def can_compare_nearly() -> bool:
    """Whether `datasketch` is installed."""
    return importlib.util.find_spec("datasketch") is not None


def near(train: Sequence[Example], held: Sequence[Example], most: int = MOST) -> Near:
    """Pairs of records that are nearly, and not exactly, the same. Needs `datasketch`.

    Args:
        train: to learn from; of more than `most`, so many are chosen evenly.
        held: held out; likewise.
        most: how many are compared.
    """
    from datasketch import MinHash, MinHashLSH

    empty, table = (
        MinHash(num_perm=_PERMUTATIONS, hashfunc=int),
        MinHashLSH(threshold=_PROPOSED, num_perm=_PERMUTATIONS),
    )
    index = _Index(empty, table)
    for example in _evenly(held, most):
        index.add(example, held=True)
    repeated, leaked = list[tuple[str, str]](), list[tuple[str, str]]()
    chosen = _evenly(train, most)
    seen: set[bytes] = set()
    for example in chosen:
        digest = _folded(body(example))
        if digest not in seen:  # what is the same exactly is found exactly
            seen.add(digest)
            repeat, leak = index.place(example)
            repeated += [(example.where, repeat)] if repeat is not None else []
            leaked += [(example.where, leak)] if leak is not None else []
    return Near(tuple(repeated), tuple(leaked), len(chosen))


def _evenly(examples: Sequence[Example], most: int) -> Sequence[Example]:
    if len(examples) <= most:
        return examples
    return [examples[place * len(examples) // most] for place in range(most)]


@final
class _Index:
    """Texts by their MinHash. A text that is near to one of its own side is not added: the first stands for both."""

    def __init__(self, empty: Any, table: Any) -> None:
        self._empty = empty
        self._table = table
        self._held: list[bool] = []
        self._examples: list[Example] = []

    def add(self, example: Example, *, held: bool) -> None:
        """Keeps a text, whatever it is near to."""
        self._insert(example, self._sketch(_runs(body(example))), held=held)

    def place(self, example: Example) -> tuple[str | None, str | None]:
        """Where the first texts of training and of those held out are to which `example` is near; adds it if new."""
        runs = _runs(body(example))
        sketch = self._sketch(runs)
        proposed = sorted(self._table.query(sketch))
        repeat = self._first([key for key in proposed if not self._held[key]], runs)
        leak = self._first([key for key in proposed if self._held[key]], runs)
        if repeat is None:
            self._insert(example, sketch, held=False)
        return repeat, leak

    def _first(self, keys: list[int], runs: NDArray[np.uint32]) -> str | None:
        for key in keys[:_CANDIDATES]:
            if _share(runs, _runs(body(self._examples[key]))) >= NEAR:
                return self._examples[key].where
        return None

    def _sketch(self, runs: NDArray[np.uint32]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch(runs.tolist())
        return sketch

    def _insert(self, example: Example, sketch: Any, *, held: bool) -> None:
        self._table.insert(len(self._examples), sketch, check_duplication=False)
        self._examples.append(example)
        self._held.append(held)


def _runs(text: str) -> NDArray[np.uint32]:
    """The different runs of three words, as hashes."""
    import numpy as np

    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.casefold())], dtype=np.uint64)
    if len(words) < _RUN:
        return np.array([zlib.crc32(text.strip().encode())], dtype=np.uint32)
    mixed = words[:-2] * np.uint64(0x9E3779B97F4A7C15) + words[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + words[2:]
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _share(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    import numpy as np

    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
