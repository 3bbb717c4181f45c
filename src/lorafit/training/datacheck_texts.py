"""A check of what the records mean, before any tokenizer: repetitions, leaks, labels, turns, answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from lorafit.training.config import Task
from lorafit.training.data import Examples
from lorafit.training.datacheck_findings import Findings, Level
from lorafit.training.examples import Conversation, Example, Labelled
from lorafit.training.forms import label_name
from lorafit.training.leakage import Leaks, Near, Repeats, compare
from lorafit.training.roles import Form
from lorafit.training.tasks import AUTO, NUMBERS, decide, numbers

_ECHO = 12  # characters from which on a prompt inside of its answer is no coincidence
_UNBALANCED = 10  # records of the largest class for each of the smallest
_FEW = 5  # records of a class from which little can be learnt
_FAR = 6  # spreads from the mean at which a number is no matter of chance


def columns_of(form: Form, *roles: str) -> str:
    """The columns that play these roles, joined; turns play all of them."""
    named = [form.columns[role] for role in roles if role in form.columns]
    return " + ".join(named) or form.columns.get("messages", "")


def check_texts(loaded: Examples, findings: Findings, *, apart: bool, task: Task = AUTO) -> None:
    """Notes all that can be told without a tokenizer.

    Args:
        loaded: what was read.
        findings: where to note.
        apart: whether the held-out records are data of their own, not a part that was split off.
        task: what is learnt from them, as the settings say it.

    Raises:
        DataError: labels are to be classes, or numbers, and are not.
    """
    repeated, leaked = compare(loaded.train, loaded.eval, loaded.removed)
    _repeats(loaded, repeated, findings)
    _leaks(loaded, leaked, findings)
    _turns([*loaded.train, *loaded.eval], loaded.form, findings)
    decided = decide(task, [*loaded.train, *loaded.eval]).task
    if isinstance(loaded.train[0], Labelled) and decided == NUMBERS:
        _numbers(loaded, findings)
    elif isinstance(loaded.train[0], Labelled):
        _labels(loaded, findings, apart=apart)


def check_near(loaded: Examples, found: Near, findings: Findings) -> None:
    """Notes records that are nearly the same."""
    field = columns_of(loaded.form, *_ASKED, *_ANSWERED[:-1])
    for where, other in found.repeats:
        findings.add(
            Level.WARNING,
            "near-duplicate",
            "The record is nearly an earlier one.",
            where,
            field=field,
            found=f"like {other}",
            fix="keep one of them, if they are not meant to weigh more",
        )
    for where, other in found.leaks:
        findings.add(
            Level.WARNING,
            "near-leak",
            "A training record is nearly a held-out one: the held-out loss will look better than it is.",
            where,
            field=field,
            found=f"like {other}",
            fix="leave it out of training, or keep such records on one side with group",
        )


_ASKED = ("system", "instruction", "input", "prompt", "text", "pair")
_ANSWERED = ("output", "completion", "label")


def _repeats(loaded: Examples, found: Repeats, findings: Findings) -> None:
    asked, everything = columns_of(loaded.form, *_ASKED), columns_of(loaded.form, *_ASKED, *_ANSWERED)
    findings.all(
        Level.WARNING,
        "duplicate",
        "The whole record repeats an earlier one.",
        found.whole,
        field=everything,
        fix="keep it once, if it is not meant to weigh more",
    )
    labelled = isinstance(loaded.train[0], Labelled)
    findings.all(
        Level.WARNING if labelled else Level.NOTE,
        "conflicting-label" if labelled else "repeated-question",
        "An earlier record has the same text and another label."
        if labelled
        else "An earlier record asks the same and is answered otherwise.",
        found.question,
        field=columns_of(loaded.form, "label") if labelled else asked,
        fix="decide on one label" if labelled else "keep one of them, unless both answers are meant",
    )
    findings.all(
        Level.NOTE,
        "alike",
        "An earlier record asks the same, but for case, punctuation and spaces.",
        found.alike,
        field=asked,
        fix="keep one of them, if they are not meant to weigh more",
    )


def _leaks(loaded: Examples, found: Leaks, findings: Findings) -> None:
    asked = columns_of(loaded.form, *_ASKED)
    mended = "nothing to do: train leaves the training records out; other held-out data keep them"
    findings.all(
        Level.WARNING,
        "leak-whole",
        "A held-out record is a training record, too.",
        found.whole,
        field=columns_of(loaded.form, *_ASKED, *_ANSWERED),
        fix=mended,
    )
    findings.all(
        Level.WARNING,
        "leak-question",
        "A held-out record asks what a training record asks.",
        found.question,
        field=asked,
        fix=mended,
    )
    findings.all(
        Level.WARNING,
        "leak-alike",
        "A held-out record asks what a training record asks, but for case, punctuation and spaces.",
        found.alike,
        field=asked,
        fix="leave one of the two out: train compares exactly, and keeps both",
    )
    findings.all(
        Level.NOTE,
        "leak-answer",
        "A held-out record has the (long) answer of a training record.",
        found.answer,
        field=columns_of(loaded.form, *_ANSWERED),
        fix="keep records with one answer on one side (group), unless such answers are meant",
    )


def _turns(examples: Sequence[Example], form: Form, findings: Findings) -> None:
    for example in examples:
        if not isinstance(example, Conversation):
            continue
        roles = [turn.role for turn in example.turns]
        spoken = roles[1:] if roles[0] == "system" else roles
        if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(spoken)):
            findings.add(
                Level.WARNING,
                "turns",
                "The turns are not user and assistant in turn after one system text: few models were trained on that.",
                example.where,
                field=columns_of(form, "messages"),
                found=" ".join(roles),
                fix="join turns of one speaker, and put the system text first",
            )
        asked = example.turns[-2].content.strip()
        if len(asked) >= _ECHO and example.turns[-1].content.lstrip().startswith(asked):
            findings.add(
                Level.WARNING,
                "echo",
                "The answer begins with the whole prompt: the model learns to repeat what it is asked.",
                example.where,
                field=columns_of(form, *_ANSWERED),
                fix="cut the prompt off the answer",
            )


def _labels(loaded: Examples, findings: Findings, *, apart: bool) -> None:
    field = columns_of(loaded.form, "label")
    learnt = _counted(loaded.train)
    first = {label_name(one): one.where for one in reversed(loaded.train) if isinstance(one, Labelled)}
    for one in loaded.eval:
        if isinstance(one, Labelled) and label_name(one) not in learnt:
            findings.add(
                Level.ERROR if apart else Level.WARNING,
                "unseen-label",
                f"The held-out label {label_name(one)!r} is on no training record: it cannot be learnt.",
                one.where,
                field=field,
                found=f"training has {', '.join(sorted(learnt)[:8])}",
                fix="correct the label, or add training records of the class",
            )
    _spellings(learnt, first, field, findings)
    if "-1" in learnt:
        findings.add(
            Level.WARNING,
            "no-label",
            "The label -1 stands for `no label` in many data sets; here it is a class.",
            first["-1"],
            field=field,
            fix="leave these records out, if they have no label",
            count=learnt["-1"],
        )
    most, fewest = max(learnt.values()), min(learnt.values())
    rare = [name for name, count in learnt.items() if count < _FEW or count * _UNBALANCED <= most]
    if len(learnt) > 1 and most >= _UNBALANCED * fewest:
        for name in rare:
            findings.add(
                Level.WARNING,
                "unbalanced",
                f"The class {name!r} is rare: {learnt[name]:,} records, and {most:,} of the most frequent class.",
                first[name],
                field=field,
                fix="add records of it; judge by the F1 of `lorafit eval`, not by accuracy",
                count=learnt[name],
            )


def _numbers(loaded: Examples, findings: Findings) -> None:
    """Numbers far from all others, and held-out ones beyond those that are learnt."""
    field = columns_of(loaded.form, "label")
    learnt = [one for one in loaded.train if isinstance(one, Labelled)]
    values = numbers(learnt)
    middle, spread = fmean(values), pstdev(values)
    for one, value in zip(learnt, values, strict=True):
        if abs(value - middle) > _FAR * spread:
            findings.add(
                Level.WARNING,
                "label-outlier",
                f"The label lies more than {_FAR} spreads from the mean of all: it weighs as much as many others.",
                one.where,
                field=field,
                found=f"{value:g}; mean {middle:.3g}, spread {spread:.3g}",
                fix="mend it if it is a slip or stands for `no label`, or predict its logarithm",
            )
    low, high = min(values), max(values)
    held = [one for one in loaded.eval if isinstance(one, Labelled)]
    for one, value in zip(held, numbers(held), strict=True):
        if not low <= value <= high:
            findings.add(
                Level.NOTE,
                "label-beyond",
                "The held-out label lies beyond all that are learnt: little can be said of such.",
                one.where,
                field=field,
                found=f"{value:g}; training has {low:g} to {high:g}",
                fix="have such labels among the training records",
            )


def _counted(examples: Sequence[Example]) -> Counter[str]:
    return Counter(label_name(one) for one in examples if isinstance(one, Labelled))


def _spellings(learnt: Counter[str], first: dict[str, str], field: str, findings: Findings) -> None:
    """Classes whose names differ in case and spaces alone."""
    spelt: dict[str, list[str]] = {}
    for name in sorted(learnt):
        spelt.setdefault(" ".join(name.casefold().split()), []).append(name)
    for names in spelt.values():
        if len(names) > 1:
            rarest = min(names, key=lambda name: learnt[name])
            findings.add(
                Level.ERROR,
                "label-spelling",
                f"Classes differ in case or spaces alone: {', '.join(map(repr, names))}.",
                first[rarest],
                field=field,
                fix=f"write all of them {max(names, key=lambda name: learnt[name])!r}",
                count=learnt[rarest],
            )
