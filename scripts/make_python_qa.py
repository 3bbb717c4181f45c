"""Make the Python Q&A data: questions about Python's standard library, answered by its docstrings.

    python scripts/make_python_qa.py src/lorafit/data/python_qa

Each public function, method, class and module of the standard library whose docstring begins with a clean,
short sentence becomes one record of `train.jsonl` or, by its top-level module, of `eval.jsonl`:

    {"question": "What does Python's `inspect.getcomments` do?",
     "answer": "Get lines of comments immediately preceding an object's source code.",
     "module": "inspect"}

The result depends on the Python version and, a little, on the platform; what is shipped is frozen (`NOTICE.md`
beside it tells from what). On one Python the script writes the same bytes each time: names are walked in
sorted order and nothing is drawn at random.

All answers are in one voice, so that a small model can take it on in a few steps: one sentence with a full
stop, an imperative for a function or method ("Return the ..."; a leading "Returns" is turned into it), a noun
phrase for a class or module. What is not said so is left out.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w-]+", text.lower()))


# Whole top-level modules, so that no held-out answer can be guessed from its neighbours in training.
EVAL_MODULES = _words(
    """
    calendar configparser difflib fractions heapq ipaddress pathlib random shutil statistics tarfile textwrap
    zipfile
    """
)
# They act when they are imported, are tests or applications, or repeat another module.
SKIPPED_MODULES = _words(
    """
    antigravity encodings ensurepip genericpath idlelib nt ntpath opcode pdb posix posixpath pydoc
    pydoc_data pyexpat sre_compile sre_constants sre_parse test this tkinter turtle turtledemo venv winreg
    """
)
# They left the standard library with Python 3.12 or 3.13: what is said of them would mislead.
REMOVED_MODULES = _words(
    """
    aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis
    nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
    """
)
MIN_WORDS, MAX_WORDS = 4, 30

VERBS = _words(
    """
    abort accept accumulate acquire activate add adjust advance allocate allow analyze apply arrange
    assert assign associate attach attempt authenticate begin bind block break build cache calculate call
    cancel change check choose clean clear close collapse collect combine compare compile complete
    compress compute concatenate configure connect construct consume control convert copy count create
    deactivate decide declare decode decompress decrease decrement define delete deliver deserialize
    detach detect determine disable disassemble discard display distribute divide draw dump duplicate emit
    enable encode encrypt end enqueue ensure enter erase escape establish estimate evaluate examine
    exchange execute exit expand expunge extend extract fail feed fetch fill filter find finish fire flush
    force forget fork format forward freeze generate get group guess handle hash hide identify implement
    import increase increment indicate initialize initiate insert inspect install interact interpret
    invalidate invoke issue iterate join kill launch leave let limit link list listen load locate lock log
    look make map mark match measure merge modify monitor move multiply normalize notify obtain open order
    output override pack parse partition pass pause peek perform pick place poll pop populate prepare
    prevent print process produce prohibit prompt provide prune push put query queue quote raise rank
    re-raise read rebuild receive recognize record recover recursively redirect redraw reduce refresh
    register reject release reload remove rename render repeat replace report represent request require
    reschedule reserve reset resize resolve respond restart restore restrict resume retrieve return
    reverse rewind roll rotate round run save scan schedule search seek select send serialize serve set
    shift show shuffle shut shutdown signal skip sleep sort specify split spawn start stop store strip
    submit subscribe substitute subtract suggest suspend swap switch take tell terminate test tokenize
    toggle trace transfer transform translate transmit trim truncate try turn unescape uninstall unlock
    unpack unquote unregister unsubscribe unwrap update upgrade validate verify wait wake walk wrap write
    yield
    """
)
NOUN_STARTS = _words("a an the abstract base exception generic interface simple")

_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`")  # :class:`~asyncio.Future`
_CALL = re.compile(r"^[\w.]+\s?\(.*\)(\s*(->|:|=).*|:)?$")  # find(sub[, start]) -> int
_FIELD = re.compile(r"^([-*+]\s|\d+[.)]\s|:\w|@\w|>>>|\.\. |[=~\-^]{3,}|[A-Z]\w*:$)")  # not prose: lists, fields
_SENTENCE = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<=[.!?])\s+(?=[A-Z`'\"(])")  # between two
_INNER_STOP = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?]\s")
_SPOILED = re.compile(  # code, private names, references to what is not quoted, and apologies
    r"->|>>>|::|==|\|\||\\|[{}<>]|https?:|XXX|TODO|\.\.\.|--|(?<!\w)_\w|\bself\b"
    r"|\b(see|above|below|following|deprecated|internal|internally|obsolete|legacy|undocumented"
    r"|subclass(es)? (should|must|may|can)|example|this (method|function) is|version \d|new in)\b",
    re.IGNORECASE,
)
# "The command is not supported": a sentence, not a noun phrase.
_CLAUSE = re.compile(r"(The|An?) (\S+ ){1,8}(is|are|was|were|has|have|can|cannot|will) ")


@dataclass(frozen=True, order=True)
class Pair:
    """One record of the file."""

    question: str
    answer: str
    module: str


def paragraph(doc: str) -> str:
    r"""The first paragraph of a docstring, on one line; lines before it that are signatures are passed over.

    >>> paragraph("f(x) -> y\n\nReturn the y\n    of x.\n\nMore.")
    'Return the y of x.'
    """
    lines: list[str] = []
    for line in inspect.cleandoc(doc).splitlines():
        text = line.strip()
        if not lines and (not text or _CALL.match(text)):
            continue
        if not text or _FIELD.match(text):
            break
        lines.append(text)
    return " ".join(" ".join(lines).split())


def plain(text: str) -> str:
    """Text without reStructuredText's roles, double back-quotes and emphasis marks.

    >>> plain("Return a :class:`~asyncio.Future` or ``None`` if *x* is `y'.")
    'Return a `asyncio.Future` or `None` if x is `y`.'
    """
    text = _ROLE.sub(r"`\1`", text)
    text = text.replace("``", "`")
    text = re.sub(r"`([\w.]+)'", r"`\1`", text)
    return re.sub(r"(?<![\w*])\*{1,2}(\w+)\*{1,2}(?!\w)", r"\1", text)


def first_sentence(text: str) -> str:
    """The first sentence, if there is nothing in it that only makes sense elsewhere; otherwise empty.

    >>> first_sentence("Return it, e.g. `x`. And more."), first_sentence("Return it as shown below. More.")
    ('Return it, e.g. `x`.', '')
    """
    sentence = _SENTENCE.split(text)[0]
    return "" if _SPOILED.search(sentence) else sentence


def imperative(text: str) -> str:
    """The text with the third person of its first verb turned into the imperative; empty if no verb leads.

    >>> imperative("Returns the name."), imperative("Recursively copies a tree."), imperative("The name.")
    ('Return the name.', 'Recursively copy a tree.', '')
    """
    words = text.split(" ")
    at = 1 if words[0].lower().endswith("ly") and len(words) > 1 else 0
    verb = words[at]
    base = next((form for form in _bases(verb) if form.lower() in VERBS), "")
    if not base or (at and not verb.islower()):
        return ""
    if any(_third_person(word) for before, word in itertools.pairwise(words[at:]) if _joins(before)):
        return ""  # "Copies the tree and returns ...": a second verb that would stay as it is
    return " ".join([*words[:at], base, *words[at + 1 :]])


def _joins(word: str) -> bool:
    return word in ("and", "or", "then") or word.endswith(",")


def _third_person(word: str) -> bool:
    return word not in VERBS and any(form in VERBS for form in _bases(word))


def _bases(verb: str) -> Iterator[str]:
    yield verb
    if verb.endswith("ies"):
        yield verb[:-3] + "y"
    if verb.endswith("es"):
        yield verb[:-2]
    if verb.endswith("s"):
        yield verb[:-1]


def answer(doc: str, kind: str) -> str:
    """The docstring's first sentence in the voice of the file, or an empty string if it has none to give.

    Args:
        doc: a docstring.
        kind: `function` for whatever is called, `class` or `module`.
    """
    text = first_sentence(plain(paragraph(doc)))
    text = text.rstrip(".")
    if not (text.isascii() and text[:1].isupper()) or text.endswith(tuple(":,;-(!?")):
        return ""
    if _unbalanced(text) or _INNER_STOP.search(text):
        return ""
    text += "."
    if kind == "function":
        text = imperative(text)
    elif text.split()[0].lower() not in NOUN_STARTS or _CLAUSE.match(text):
        return ""
    return text if MIN_WORDS <= len(text.split()) <= MAX_WORDS else ""


def _unbalanced(text: str) -> bool:
    quotes = re.sub(r"(?<=\w)'(?=\w)|(?<=s)'(?=\s)", "", text)  # apostrophes are none
    return (
        text.count("(") != text.count(")")
        or text.count("[") != text.count("]")
        or text.count("`") % 2 == 1
        or text.count('"') % 2 == 1
        or quotes.count("'") % 2 == 1
    )


def question(name: str, kind: str) -> str:
    """The question whose answer is the description of `name`."""
    if kind == "module":
        return f"What is Python's `{name}` module?"
    return f"What is Python's `{name}`?" if kind == "class" else f"What does Python's `{name}` do?"


def modules() -> Iterator[tuple[str, ModuleType]]:
    """Every public module of the standard library that can be imported here, with its public name, sorted."""
    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES - REMOVED_MODULES):
        module = _imported(name)
        if module is None:
            continue
        yield name, module
        for info in pkgutil.walk_packages(list(getattr(module, "__path__", ())), f"{name}."):
            child = _imported(info.name)
            if child is not None:
                yield info.name, child
        if name == "os":
            yield "os.path", module.path


def _imported(name: str) -> ModuleType | None:
    if any(part.startswith("_") or part in ("test", "tests") for part in name.split(".")):
        return None
    try:
        return importlib.import_module(name)
    except ImportError:  # of another platform, or of a library that is not here
        return None


def documented() -> Iterator[tuple[str, str, str]]:
    """Name, kind and docstring (may be empty) of every public module, function, class and method."""
    for name, kind, value in objects():
        # The docstring of some built-in types is a descriptor.
        yield name, kind, value.__doc__ if isinstance(value.__doc__, str) else ""


def objects() -> Iterator[tuple[str, str, object]]:
    """Name, kind and value of every public module, function, class and method."""
    for prefix, module in modules():
        yield prefix, "module", module
        for key, value in sorted(vars(module).items()):
            if not _belongs(key, value, module):
                continue
            name = key if prefix == "builtins" else f"{prefix}.{key}"
            if not inspect.isclass(value):
                yield name, "function", value
                continue
            yield name, "class", value
            for attribute, member in sorted(_members(value).items()):
                if not attribute.startswith("_") and inspect.isroutine(member):
                    yield f"{name}.{attribute}", "function", member


def _members(kind: type) -> dict[str, object]:
    """What a class defines itself or takes from its implementation in C (`socket.socket` from `_socket`)."""
    members: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        if base is kind or base.__module__.startswith("_"):
            members |= vars(base)
    bound = (classmethod, staticmethod)
    return {key: member.__func__ if isinstance(member, bound) else member for key, member in members.items()}


def _belongs(key: str, value: object, module: ModuleType) -> bool:
    """Whether a module's attribute is a public function or class that is this module's own to document."""
    if key.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
        return False
    if inspect.isclass(value) and value.__name__ != key:
        return False  # another name of a class that has its own
    if hasattr(module, "__all__"):
        return key in module.__all__
    return (getattr(value, "__module__", None) or "").lstrip("_") == module.__name__


def pairs(entries: Iterable[tuple[str, str, str]]) -> list[Pair]:
    """Clean records of `(name, kind, docstring)`, without an answer twice, ordered by question.

    Of names with the same or nearly the same answer the one with the fewest dots is kept, then the first in
    the alphabet; a held-out one before any for training.
    """
    kept: list[Pair] = []
    seen: list[frozenset[str]] = []
    for name, kind, doc in sorted(entries, key=_precedence):
        text = answer(doc, kind)
        words = _words(text)
        if not text or any(alike(words, other) for other in seen):
            continue
        seen.append(words)
        kept.append(Pair(question(name, kind), text, _group(name)))
    return sorted(kept)


def _precedence(entry: tuple[str, str, str]) -> tuple[bool, int, str]:
    name = entry[0]
    return _group(name) not in EVAL_MODULES, name.count("."), name


def _group(name: str) -> str:
    """The top-level module of a qualified name."""
    first = name.split(".")[0]
    return "builtins" if first in vars(builtins) else first


def alike(left: frozenset[str], right: frozenset[str]) -> bool:
    """Whether two sets of words share at least four fifths of what they hold together."""
    return 5 * len(left & right) >= 4 * len(left | right)


def main(directory: Path) -> None:
    """Write the two files and say how much is in them."""
    warnings.simplefilter("ignore")  # of modules that are going away
    records = pairs(documented())
    for split in ("train", "eval"):
        chosen = [record for record in records if (record.module in EVAL_MODULES) == (split == "eval")]
        lines = (json.dumps(asdict(record)) + "\n" for record in chosen)
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(split, len(chosen), "records of", len({record.module for record in chosen}), "modules")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
