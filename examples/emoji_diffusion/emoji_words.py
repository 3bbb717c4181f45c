"""The words of the captions as CLIP's tokenizer has them: pairs of pieces that occur most often become one piece.

Plain Python, so that the same captions give the same vocabulary everywhere. Every letter and digit is in it, alone and
at the end of a word: what no caption says can be spelled all the same, as an identifier such as `sks` is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLOSE = "</w>"
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")
"""What the tokenizer takes apart before it looks for pieces; captions have small letters alone."""

Merge = tuple[str, str]


def counted(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs.

    >>> counted(["a dog, a cat"])
    Counter({'a': 2, 'dog': 1, ',': 1, 'cat': 1})
    """
    return Counter(word for caption in captions for word in WORD.findall(caption))


def merges(words: Mapping[str, int], most: int = 4096, least: int = 2) -> list[Merge]:
    """The pairs of pieces that become one, in the order in which they do: the most frequent pair first.

    Args:
        words: how often each occurs.
        most: no more pairs than these.
        least: nor pairs that occur less often.

    >>> merges({"aab": 3, "ab": 1})
    [('a', 'b</w>'), ('a', 'ab</w>')]
    """
    pieces = {word: (*word[:-1], word[-1] + CLOSE) for word in words}
    found: list[Merge] = []
    while len(found) < most:
        pairs: Counter[Merge] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = max(pairs.items(), key=lambda each: (each[1], each[0]), default=None)
        if best is None or best[1] < least:
            break
        found.append(best[0])
        pieces = {word: joined(parts, best[0]) for word, parts in pieces.items()}
    return found


def joined(parts: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    """The pieces of a word with a pair made one wherever it occurs, from the left.

    >>> joined(("a", "a", "a"), ("a", "a"))
    ('aa', 'a')
    """
    if pair[0] not in parts:
        return parts
    made: list[str] = []
    place = 0
    while place < len(parts):
        together = parts[place : place + 2] == pair
        made.append(parts[place] + parts[place + 1] if together else parts[place])
        place += 2 if together else 1
    return tuple(made)


def vocabulary(pairs: Iterable[Merge]) -> dict[str, int]:
    """Piece → its number: the two marks, every letter alone and as a word's last, then what the pairs make."""
    pieces = [START, END, *LETTERS, *(letter + CLOSE for letter in LETTERS), *(a + b for a, b in pairs)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def tokenizer(pairs: Iterable[Merge], length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with these pairs, for prompts of `length` pieces with the two marks."""
    from transformers import CLIPTokenizer

    own: list[Any] = [tuple(pair) for pair in pairs]
    return CLIPTokenizer(vocab=vocabulary(own), merges=own, model_max_length=length)
