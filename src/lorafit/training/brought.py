"""The classes of a head that a model's files bring, beside the labels of the records: which label is which output."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.errors import ConfigError, some

UNNAMED = "LABEL_"
"""What `transformers` calls a class of which nobody said the name, before its index."""


def ordered(labels: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The records' labels, spelt as they are, in the order of a head's classes; as given where names do not agree.

    Upper and lower case are alike, unless two labels differ in that alone.

    >>> ordered(("negative", "positive"), ("POSITIVE", "NEGATIVE"))
    ('positive', 'negative')
    >>> ordered(("no", "yes"), ("LABEL_0", "LABEL_1"))
    ('no', 'yes')
    """
    for alike in (str, str.casefold):
        own = {alike(name): name for name in labels}
        theirs = [alike(name) for name in known]
        if len(own) == len(labels) == len(theirs) and own.keys() == set(theirs):
            return tuple(own[name] for name in theirs)
    return tuple(labels)


def agreed(labels: Sequence[str], known: Sequence[str], path: str) -> str:
    """What is to be said of labels that are put on the outputs of a head which a model's files bring.

    Args:
        labels: of the records, as `ordered` gave them.
        known: the head's own.
        path: the model's.

    Raises:
        ConfigError: the head's classes have other names.
    """
    if [name.casefold() for name in labels] == [name.casefold() for name in known]:
        return "" if list(labels) == sorted(labels) else f"classes in the order of the model's head: {_told(labels)}"
    unnamed = [f"{UNNAMED}{index}" for index in range(len(labels))]
    if list(known) == unnamed:
        return f"the model's head does not name its classes; they are taken to be in this order: {_told(labels)}"
    if list(labels) == [str(index) for index in range(len(known))]:
        return f"the labels are taken for the places of the head's classes: {_told(known)}"
    raise ConfigError(
        "the head that the model's files bring was trained on other classes",
        where=f"model: {path}",
        found=f"labels {some(map(repr, labels), 8)}",
        expected=f"those of the head: {some(map(repr, known), 8)}",
        fix="write the head's names into the records, or take a model without a head",
    )


def _told(names: Sequence[str]) -> str:
    """Which output is which.

    >>> _told(("no", "yes"))
    '0 no, 1 yes'
    """
    return some((f"{index} {name}" for index, name in enumerate(names)), 12)
