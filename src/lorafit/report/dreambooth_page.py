"""The report of `lorafit dreambooth`: the same prompts drawn before, during and after, and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from lorafit.errors import DataError
from lorafit.report import anatomy, document, head, importance, pictures, ranks, tables, text
from lorafit.report.document import frame
from lorafit.report.figures import Plot, draw
from lorafit.report.history import read_records
from lorafit.report.pictures import Reader, Sheet, read_png
from lorafit.report.records import Evaluation, Run, Step
from lorafit.report.summary import Summary, summarize
from lorafit.report.text import escape

MOST: Final = 24
"""So many pictures of the subject are shown at most, and half as many of the class."""


@dataclass(frozen=True)
class Shown:
    """What of a run's pictures is on the page.

    Attributes:
        subject: files of the pictures that were learnt from.
        prior: files of the pictures of the class.
        sheet: reads a sheet of samples.
        thumbnail: reads a picture that is shown small.
    """

    subject: Sequence[Path] = ()
    prior: Sequence[Path] = ()
    sheet: Reader = read_png
    thumbnail: Reader = read_png


def write_dreambooth(records_path: Path | str, html_path: Path | str, shown: Shown | None = None) -> Path:
    """Draw the records and the sheets of a run as one self-contained HTML file, written whole or not at all.

    Args:
        records_path: the run's `records.jsonl`; the sheets are found from its folder.
        html_path: the file to write; its folder is created when missing, a former report is replaced.
        shown: further pictures, and how all are read; by default the sheets alone, as they are.

    Returns:
        `html_path`.

    Raises:
        DataError: the records cannot be read or are damaged; the message names file and line.
        MissingExtraError: plotly is not installed.
        ConfigError: the report cannot be written there.
    """
    document.check_place(html_path, records_path, "report")
    return document.write(render(read_records(records_path), shown or Shown()), Path(html_path))


def render(run: Run, shown: Shown) -> str:
    """The page of `run`, as HTML."""
    summary = summarize(run)
    losses, course = _losses(run)
    budget, moved = ranks.draw(run), anatomy.draw(run)
    parts = (_part("Data", run.data), tables.settings(run), tables.environment(run))
    body = (
        head.header(
            run,
            summary,
            over="lorafit DreamBooth report",
            heading=title(run),
            kind=_kind(run),
            words=lead(run, summary),
        ),
        document.tiles(_facts(run, summary)),
        head.verdict(run),
        head.remarks(run),
        _samples(run, summary, shown.sheet),
        _learnt(shown),
        _curves(run, losses, course),
        importance.section(run),
        ranks.section(run, "".join(map(frame, budget))),
        "".join(anatomy.section(run, frame(plot)) for plot in moved),
        f'<div class="parts">{"".join(parts)}</div>',
        tables.history(run),
    )
    return document.page(title(run), "\n".join(body), [*losses, *course, *budget, *moved], str(run.path))


# Words


def title(run: Run) -> str:
    """What was learnt, as plain text."""
    prompt = head.told(run.config, "instance_prompt")
    return "A DreamBooth run" if prompt is None else f"“{prompt}”"


def _model(run: Run) -> str | None:
    return head.told(run.resolved, "model") or head.told(run.config, "pipeline")


def _method(run: Run) -> str | None:
    return head.told(run.resolved, "method") or head.told(run.config, "method")


def _kind(run: Run) -> list[str]:
    return [part for part in (_model(run), _method(run), head.told(run.config, "instance_images")) if part]


def lead(run: Run, summary: Summary) -> str:
    """What was learnt by what and from what, and the verdict, in plain language; what was not recorded is left out."""
    model = _model(run)
    sentences = [] if model is None else [f"{model} was trained{_from(run, summary)}{_how(run, summary)}."]
    sentences += [told for told in (_change(run, summary), _prior_change(run)) if told is not None]
    if run.verdict is not None:
        sentences.append(f"Verdict: {run.verdict.sentence.rstrip('.')}.")
    return " ".join(sentences)


def _from(run: Run, summary: Summary) -> str:
    """The pictures and the steps, as the end of "was trained"."""
    count, prior = run.data.get("instance_pictures"), run.data.get("class_pictures")
    on = ""
    if type(count) is int:
        on = f" on {_many(count, 'picture')} of a subject"
        on += f", beside {_many(prior, 'picture')} of its class{_kept(run)}," if type(prior) is int and prior else ""
    steps = summary.last_step
    return on + ("" if steps is None else f" for {_many(steps, 'step')}")


def _kept(run: Run) -> str:
    """The other prompts that pictures beside those of the class were drawn for."""
    kept = run.config.get("keep_prompts")
    return f" and of {_many(len(kept), 'other prompt')}" if isinstance(kept, list) and kept else ""


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _how(run: Run, summary: Summary) -> str:
    method = _method(run)
    if method is None:
        return ""
    share = summary.share
    return f" by {method}" + (
        "" if share is None else f", which adjusts {text.percent(share)} as many numbers as the adapted parts have"
    )


def _change(run: Run, summary: Summary) -> str | None:
    """What became of the loss on the subject."""
    before, after = _ends(summary)
    if before is None or after is None:
        return None
    where = "pictures of it that were kept aside" if run.config.get("eval_images") else "its pictures"
    return f"On {where}, under noise that training never draws, the loss {_moved(before, after)}."


def _prior_change(run: Run) -> str | None:
    """What became of the loss on the class: what was to stay as it was."""
    known = _prior(run)
    return f"On pictures of the class it {_moved(known[0], known[-1])}." if len(known) > 1 else None


def _ends(summary: Summary) -> tuple[float | None, float | None]:
    """The loss on the subject before and after."""
    before, after = summary.before, summary.after
    return None if before is None else before.loss, None if after is None else after.loss


def _prior(run: Run) -> list[float]:
    return [one.prior_loss for one in run.evaluations if one.prior_loss is not None]


def _moved(before: float, after: float) -> str:
    first, last = loss(before), loss(after)
    if first == last:
        return f"stayed at {last}"
    by = f", by {text.percent(abs(after / before - 1))}" if before else ""
    return f"{'fell' if after < before else 'rose'} from {first} to {last}{by}"


def loss(value: float | None) -> str:
    """A loss of the prediction of noise, which is a small number, with four places."""
    return text.NONE if value is None else f"{value:.4f}"


def _facts(run: Run, summary: Summary) -> list[tuple[str, str]]:
    before, after = _ends(summary)
    facts = [("loss on the subject", f"{loss(before)} → {loss(after)}")]
    if known := _prior(run):
        facts.append(("loss on the class", f"{loss(known[0])} → {loss(known[-1])}"))
    return [
        *facts,
        ("steps", text.count(summary.last_step)),
        ("time", text.duration(summary.seconds)),
        ("peak memory", text.size(summary.peak_bytes))
        if summary.device_bytes is None
        else ("peak memory on the device", text.size(summary.device_bytes)),
        ("trained numbers", text.count(summary.trainable)),
    ]


# Pictures


def _samples(run: Run, summary: Summary, reader: Reader) -> str:
    """The first and the last sheet side by side, and those in between in a row."""
    if not run.sheets:
        return tables.section("Samples", '<p class="fine">The run drew no samples.</p>', "full")
    first, *between = run.sheets
    last = between.pop() if between else None
    ends = [_sheet(run, first, "before training, step 0" if first.step == 0 else f"step {first.step:,}", reader)]
    if last is not None:
        word = "after training" if summary.status == "done" else "last drawn"
        ends.append(_sheet(run, last, f"{word}, step {last.step:,}", reader))
    way = ""
    if between:
        drawn = (_sheet(run, each, f"step {each.step:,}", reader) for each in between)
        way = f"<h3>On the way</h3>{pictures.strip(drawn, 'Samples on the way')}"
    prompts = "".join(f"<li>{escape(each)}</li>" for each in first.prompts)
    asked = f'<p class="fine">The prompts, from above:</p><ol class="quoted">{prompts}</ol>' if prompts else ""
    note = "All sheets have the same prompts and begin with the same noise: what differs between them was learnt."
    if len({(each.prompts, each.seeds) for each in run.sheets}) > 1:
        note = "Prompts or seeds changed when the run was resumed: the prompts above are those of the first sheet."
    return tables.section(
        "Samples", f'{asked}{pictures.beside(ends)}{way}<p class="fine note">{escape(note)}</p>', "full"
    )


def _sheet(run: Run, sheet: Sheet, caption: str, reader: Reader) -> str:
    alt = f"Samples at step {sheet.step:,}" + (f", {sheet.columns} in a row" if sheet.columns else "")
    asked = f": {'; '.join(sheet.prompts)}" if sheet.prompts else ""
    return _picture(reader, run.path.parent / sheet.path, caption, alt + asked)


def _picture(reader: Reader, path: Path, caption: str, alt: str) -> str:
    """A picture, or in its place why it cannot be shown."""
    try:
        return pictures.shown(reader(path), caption, alt)
    except DataError as error:
        return pictures.lost(caption, f"{error.message}: {path}")


def _learnt(shown: Shown) -> str:
    """The pictures that were learnt from, and those of the class."""
    parts = []
    for name, paths, most in (
        ("Pictures of the subject", shown.subject, MOST),
        ("Pictures of the class, which keep the rest as it was", shown.prior, MOST // 2),
    ):
        if not paths:
            continue
        drawn = (_picture(shown.thumbnail, path, path.name, f"{name}: {path.name}") for path in paths[:most])
        left = f'<p class="fine">and {len(paths) - most:,} more</p>' if len(paths) > most else ""
        parts.append(f"<h3>{name}</h3>{pictures.thumbnails(drawn, name)}{left}")
    return tables.section("What it learnt from", "".join(parts), "full") if parts else ""


# Curves


def _losses(run: Run) -> tuple[list[Plot], list[Plot]]:
    """The curves of the losses, and those of how the training went."""
    by = {plot.key: plot for plot in draw(replace(run, steps=tuple(map(_of_subject, run.steps))))}
    subject = by.pop("loss", None)
    losses = [] if subject is None else [replace(subject, title="Loss on the subject")]
    # The same figure once more, of the class: nothing but its losses is left to be drawn.
    steps, measured = map(_of_class, run.steps), map(_measured_of_class, run.evaluations)
    for plot in draw(replace(run, steps=tuple(steps), evaluations=tuple(measured))):
        losses.append(replace(plot, key="prior", title="Loss on the class"))
    return losses, list(by.values())


def _of_subject(step: Step) -> Step:
    return step if step.instance_loss is None else replace(step, loss=step.instance_loss)


def _of_class(step: Step) -> Step:
    return replace(
        step,
        loss=step.prior_loss,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=None,
        examples_per_second=None,
        peak_rss_bytes=None,
        peak_device_bytes=None,
        diverged=False,
    )


def _measured_of_class(one: Evaluation) -> Evaluation:
    return replace(one, loss=one.prior_loss, accuracy=None)


def _curves(run: Run, losses: Iterable[Plot], course: Iterable[Plot]) -> str:
    first = "".join(f"<h3>{escape(plot.title)}</h3>{frame(plot)}" for plot in losses)
    if not first:
        return tables.section("Loss", '<p class="fine">The run recorded no step.</p>', "full")
    notes = ["Held-out: the same pictures under the same noises each time, which training never draws."]
    if _prior(run):
        notes.append("The loss on the class tells what was forgotten: it should stay about where it was.")
    fine = f'<p class="fine note">{escape(" ".join(notes))}</p>' if run.evaluations else ""
    rest = "".join(f'<div class="small"><h3>{escape(plot.title)}</h3>{frame(plot)}</div>' for plot in course)
    made = tables.section("Loss", f"{first}{_evaluations(run.evaluations)}{fine}", "full")
    return made + (
        tables.section("Course of the training", f'<div class="smalls">{rest}</div>', "full") if rest else ""
    )


def _evaluations(found: Sequence[Evaluation]) -> str:
    """The held-out measurements as numbers, folded."""
    if not found:
        return ""
    classes = any(one.prior_loss is not None for one in found)
    names = ["step", "loss on the subject", *(["loss on the class"] if classes else [])]
    rows = [[f"{one.step:,}", loss(one.loss), *([loss(one.prior_loss)] if classes else [])] for one in found]
    return (
        f"<details><summary>Held-out measurements as numbers ({len(rows)})</summary>"
        f"{tables.numbers(names, rows)}</details>"
    )


def _part(name: str, values: Mapping[str, Any]) -> str:
    if not values:
        return tables.missing(name, f"The run recorded nothing about its {name.lower()}.")
    return tables.section(name, tables.facts(values))
