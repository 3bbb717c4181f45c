"""Few labels and many records without: does training on the model's own confident answers help?

    1. the labelled records are split: to train on, to choose and calibrate by, to report on (`parts`);
    2. a supervised run of each seed, on the labelled records alone;
    3. its model answers the unlabelled records (`pseudo_guessing`), its confidences calibrated (`pseudo_calibration`);
    4. a run from the start on the labelled records and the confident answers (`pseudo_choosing`), for as many steps;
       3 and 4 again for each further round;
    5. both models of each seed are measured on the test part, record by record (`pseudo_verdict`).

After Lee 2013 ("Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks"): a
confident answer is trained on as if it was a label. A pseudo-labelled record weighs as much as a labelled one: Lee
raises its weight slowly, and Sohn et al. 2020 (FixMatch, arXiv:2001.07685, section 2.2) find that unnecessary above a
confidence, with a weight of 1. How much they count is governed by how many they are (`ratio`). Arazo et al. 2020
(arXiv:1908.02983) show how such training confirms its own errors, and that true labels in every batch check it; hence
the run from the start each time, the quota of each class, and the warnings.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lorafit import __version__, files
from lorafit.errors import ConfigError, some
from lorafit.experiments.claim import alone, claim
from lorafit.experiments.measuring import adapted
from lorafit.experiments.parts import part
from lorafit.experiments.pseudo_calibration import ENOUGH
from lorafit.experiments.pseudo_choosing import choose, warnings_of
from lorafit.experiments.pseudo_guessing import Guesser, guesser
from lorafit.experiments.pseudo_reading import Unlabelled, answer_name, line, read_unlabelled
from lorafit.experiments.pseudo_verdict import verdict
from lorafit.experiments.runner import Runner
from lorafit.experiments.trial import Notify, Result, Trial
from lorafit.training.choices import closed_answers
from lorafit.training.config import Settings
from lorafit.training.examples import Conversation, Example, Labelled
from lorafit.training.forms import examples, label_name, recognise
from lorafit.training.owned import ADAPTER
from lorafit.training.sources import read_records

FORMAT = 1
RESULTS = "few-labels.json"
ASKED = "asked.json"
LABELS = "labels"
EVALUATIONS = 10
"""How often a run is evaluated on the validation part: all runs at the same steps, so that all can choose alike."""
TEST = "the test part"
FEW_TESTS = 50
"""With fewer test records, that they are few is said."""


@final
@dataclass(frozen=True)
class Wanted:
    """What is asked.

    Attributes:
        unlabelled: a file, a directory or a hub name.
        confidence: answers that are less sure are not trained on.
        ratio: of a class at most so many times as many pseudo-labelled records as it has labelled ones.
        rounds: how often the model labels and is trained anew.
        seeds: so many runs of each kind.
    """

    unlabelled: str
    confidence: float = 0.9
    ratio: float = 3.0
    rounds: int = 1
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, value, good, expected, fix in (
            ("confidence", self.confidence, 0 < self.confidence < 1, "between 0 and 1", "0.9"),
            ("ratio", self.ratio, 0 < self.ratio < math.inf, "above 0", "3"),
            ("rounds", self.rounds, self.rounds >= 1, "at least 1", "1"),
            ("seeds", self.seeds, self.seeds >= 3, "at least 3: fewer cannot tell a difference from chance", "3"),
        ):
            if not good:
                raise ConfigError(
                    f"{name} is out of range", where=f"--{name}", found=value, expected=expected, fix=f"--{name} {fix}"
                )


def few_labels(settings: Settings, wanted: Wanted, runner: Runner, *, command: str, notify: Notify) -> dict[str, Any]:
    """Runs the experiment in `settings.folder`, or goes on with it.

    Returns:
        What few-labels.json holds.

    Raises:
        LorafitError: data, settings or folder do not do; what is finished stays finished.
    """
    return _Experiment(settings, wanted, runner, command, notify).execute()


@final
class _Experiment:
    """The steps of the experiment, and what they share."""

    def __init__(self, settings: Settings, wanted: Wanted, runner: Runner, command: str, notify: Notify) -> None:
        self.settings = settings
        self.wanted = wanted
        self.runner = runner
        self.command = command
        self.notify = notify
        self.folder = settings.folder
        self.warned: list[str] = []
        self.seeds = [settings.seed + number for number in range(wanted.seeds)]
        self.rows: dict[int, dict[str, Any]] = {seed: {"seed": seed, "rounds": []} for seed in self.seeds}

    def execute(self) -> dict[str, Any]:
        self._check_asked()
        with alone(self.folder):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self.parts = part(self.settings, self.folder)
        for sentence in self.parts.said:
            self.notify(sentence)
        if self.parts.numbers:
            raise ConfigError(
                "a model cannot label by itself what are numbers: how sure it is of one, it does not say",
                where="task",
                found="labels that are numbers to predict",
                expected="classes or answers of a closed set",
                fix="name classes (such as low and high), or label more records",
            )
        self.train = self._read(self.parts.train)
        self.held = self._read(self.parts.validation)
        self.test = self._read(self.parts.test)
        self.unlabelled = self._unlabelled()
        self.counts, self.answers = self._answers()
        self.steps = self._steps()
        before = {result.name: result for result in self.runner.run([self._supervised(seed) for seed in self.seeds])}
        for seed in self.seeds:
            self._keep(seed, "supervised", before[self._supervised(seed).name])
        for number in range(1, self.wanted.rounds + 1):
            self._round(number)
        return self._finish()

    # What is given ------------------------------------------------------------------------------------------------

    def _check_asked(self) -> None:
        """The folder is this experiment's. More rounds or seeds are the same one, continued."""
        digest = hashlib.sha256(
            "".join(line(one.fields) for one in read_records(self.wanted.unlabelled).records).encode()
        ).hexdigest()
        mine: dict[str, Any] = {
            "settings": self.settings.model_copy(update={"output_dir": ""}).model_dump(mode="json"),
            "unlabelled": digest,
            "confidence": self.wanted.confidence,
            "ratio": self.wanted.ratio,
        }
        claim(self.folder, ASKED, mine)

    def _read(self, path: str) -> list[Example]:
        source = read_records(path)
        self.form = recognise(source, self.settings.columns)
        return examples(source, self.form)

    def _unlabelled(self) -> Unlabelled:
        known = {TEST: self.test, "the validation part": self.held, "the training part": self.train}
        read = read_unlabelled(self.wanted.unlabelled, self.form, known)
        self.notify(f"{len(read.records):,} unlabelled records")
        for name, places in read.leaks.items():
            if places:
                say = self._warn if name is TEST else self.notify
                say(f"{len(places):,} unlabelled records left out: {name} asks the same ({some(places, 3)})")
        for sentence in read.said:
            self.notify(sentence)
        if len(self.test) < FEW_TESTS:
            self._warn(
                f"{len(self.test):,} test records are few: a difference has to be large to be told from chance; "
                "--eval-data names more"
            )
        if len(self.held) < ENOUGH:
            self._warn(
                f"{len(self.held):,} validation records are few to calibrate on (below {ENOUGH}): what a confidence of "
                f"{self.wanted.confidence:g} is worth is known roughly"
            )
        return read

    def _answers(self) -> tuple[dict[str, int] | None, tuple[str, ...] | None]:
        """Class → labelled training records (None for open answers), and a language model's closed set."""
        answers = closed_answers(self.train)
        if answers is None and isinstance(self.train[0], Conversation):
            self.notify(
                "the answers are open: the model writes them, and is as sure as their tokens are probable on average"
            )
            return None, None
        counts = Counter(map(answer_name, self.train))
        told = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
        if answers is not None:
            self.notify(f"{len(answers)} answers that come again and again are taken for classes: {told}")
        return dict(counts), answers

    def _steps(self) -> int:
        training = self.settings.training
        size = int(training["per_device_train_batch_size"]) * int(training.get("gradient_accumulation_steps", 1))
        steps = int(training.get("max_steps", -1))
        if steps <= 0:
            steps = max(1, math.ceil(float(training["num_train_epochs"]) * math.ceil(len(self.train) / size)))
        self.notify(
            f"every run takes {steps:,} steps of {size} records from the same first values: on the {len(self.train):,} "
            f"labelled records alone {steps * size / len(self.train):.1f} passes over them, fewer with pseudo-labels"
        )
        return steps

    # Runs ---------------------------------------------------------------------------------------------------------

    def _settings(self, seed: int, data: str) -> Settings:
        every = max(1, self.steps // EVALUATIONS)
        training = {
            **self.settings.training,
            "max_steps": self.steps,
            "eval_strategy": "steps",
            "eval_steps": self.settings.training.get("eval_steps") or every,
        }
        own: dict[str, Any] = {
            "data_split": None,
            "eval_data_split": None,
            "eval_split": None,
            "eval_limit": None,
            "group": None,
        }
        own |= {"general": "none", "target": None, "slice": None}  # what nobody is told of here is not measured
        return self.settings.model_copy(
            update={
                **own,
                "data": data,
                "eval_data": self.parts.validation,
                "seed": seed,
                "samples": 0,
                "training": training,
            }
        )

    def _supervised(self, seed: int) -> Trial:
        return self._trial(f"supervised/seed-{seed}", seed, self.parts.train)

    def _trial(self, name: str, seed: int, data: str) -> Trial:
        return Trial(name, self._settings(seed, data), measured=self.parts.test, forget=True)

    def _place(self, number: int, seed: int, suffix: str) -> Path:
        return self.folder / LABELS / f"round-{number}" / f"seed-{seed}{suffix}"

    def _round(self, number: int) -> None:
        """Labels with each seed's newest model, and trains anew."""
        trials: dict[int, Trial] = {}
        for seed in self.seeds:
            row = self.rows[seed]
            newest = row["rounds"][-1]["result"] if row["rounds"] else row["supervised"]
            if newest["failed"] is not None:
                continue
            found = self._look(number, seed, newest["trial"])
            row["rounds"].append({"round": number, **found, "result": None})
            for sentence in found["warnings"]:
                self._warn(sentence)
            if found["taken"]:
                trials[seed] = self._trial(
                    f"round-{number}/seed-{seed}", seed, str(self._place(number, seed, ".jsonl"))
                )
            else:
                self.notify(f"round {number}, seed {seed}: no answer is trained on, so its model stays as it is")
                row["rounds"][-1]["result"] = newest
            self._write(None)
        done = {result.name: result for result in self.runner.run(list(trials.values()))}
        for seed, trial in trials.items():
            self._keep(seed, "result", done[trial.name])
        self._write(None)

    def _keep(self, seed: int, key: str, result: Result) -> None:
        row = self.rows[seed] if key == "supervised" else self.rows[seed]["rounds"][-1]
        measured = result.measured
        row[key] = {
            "trial": result.name,
            "validation": result.validation,
            "losses": None if measured is None else list(measured.losses),
            "counts": None if measured is None else list(measured.counts),
            "correct": None if measured is None or measured.correct is None else list(measured.correct),
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "curve": [list(each) for each in result.curve],
            "failed": result.failed,
        }
        if result.failed is not None:
            self._warn(f"{result.name} failed: {result.failed}; its seed is left out of the comparison")

    def _look(self, number: int, seed: int, trial: str) -> dict[str, Any]:
        """What a model makes of the unlabelled records; and the file that the next run of this seed trains on."""
        path = self._place(number, seed, ".json")
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        self.notify(f"{trial} labels {len(self.unlabelled.records):,} records")
        with self._answering(trial, seed) as model:
            calibration = model.calibrate(self.held, self.wanted.confidence)
            guesses = model.guess(self.unlabelled.examples, calibration.temperature)
        choice = choose(
            guesses.items,
            self.unlabelled.examples,
            self.counts,
            confidence=self.wanted.confidence,
            most=self.wanted.ratio,
            records=len(self.train),
            seed=seed,
        )
        own = self.unlabelled.own
        told = [(own[one.place], one.answer) for one in choice.taken if one.place in own]
        text = Path(self.parts.train).read_text(encoding="utf-8")
        raw = self._raw()
        pseudo = [line(self.unlabelled.answered(one.place, raw.get(one.answer, one.answer))) for one in choice.taken]
        files.write_text(self._place(number, seed, ".jsonl"), text + "".join(pseudo))
        found = {
            "labelled_by": trial,
            "calibration": asdict(calibration),
            "said": calibration.sentence(),
            "answered": len(guesses.items),
            "left": len(guesses.left),
            "left_why": guesses.why if guesses.left else "",
            "sure": choice.sure,
            "taken": len(choice.taken),
            "shares": {name: list(each) for name, each in choice.shares.items()},
            "apart": choice.apart,
            "known": len(told),
            "right": sum(a == b for a, b in told) / len(told) if told else None,
            "warnings": warnings_of(choice, calibration, f"round {number}, seed {seed}"),
        }
        files.write_text(path, json.dumps(found))  # last: who finds it finds the records that it tells of
        self.notify(
            f"{calibration.sentence()}; {choice.sure:,} of {len(guesses.items):,} unlabelled records are as sure, "
            f"{len(choice.taken):,} are trained on"
        )
        return found

    @contextmanager
    def _answering(self, trial: str, seed: int) -> Iterator[Guesser]:
        """A trial's model, as long as it is asked."""
        asked = Trial(trial, self._settings(seed, self.parts.train))
        loaded = adapted(asked.settings, asked.folder(self.folder) / ADAPTER, self.notify)
        yield guesser(loaded, asked.settings, self.answers)
        del loaded
        gc.collect()

    def _raw(self) -> dict[str, str | int | float]:
        """A class's name → its label as the data write it: 1, "1" and true are not the same."""
        return {label_name(one): one.label for one in self.train if isinstance(one, Labelled)}

    def _right(self, result: dict[str, Any], seed: int) -> list[float] | None:
        """1 for each test record that is answered rightly; None where answers are open."""
        if result["correct"] is not None or self.answers is None:
            return None if result["correct"] is None else list(result["correct"])
        path = self.folder / LABELS / "test" / f"{result['trial']}.json"
        if not path.is_file():
            with self._answering(result["trial"], seed) as model:
                files.write_text(path, json.dumps(model.right(self.test)))
        return list(json.loads(path.read_text(encoding="utf-8")))

    # What came of it ----------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        for seed in self.seeds:
            row = self.rows[seed]
            for result in [row["supervised"], *(one["result"] for one in row["rounds"])]:
                if result["failed"] is None:
                    result["correct"] = self._right(result, seed)
        pairs = [
            (row["supervised"], row["rounds"][-1]["result"])
            for row in self.rows.values()
            if row["rounds"] and row["supervised"]["failed"] is None and row["rounds"][-1]["result"]["failed"] is None
        ]
        return self._write(verdict(pairs, self.folder))

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.append(sentence)
            self.notify(f"warning: {sentence}")

    def _write(self, told: Mapping[str, Any] | None) -> dict[str, Any]:
        made = {
            "format": FORMAT,
            "lorafit": __version__,
            "command": self.command,
            "settings": self.settings.model_dump(mode="json"),
            "wanted": asdict(self.wanted),
            "data": {**asdict(self.parts), "unlabelled_records": len(self.unlabelled.records)},
            "unlabelled_said": list(self.unlabelled.said),
            "classes": self.counts,
            "steps": self.steps,
            "seeds": list(self.rows.values()),
            "warnings": self.warned,
            "verdict": told,
        }
        text = json.dumps(made, ensure_ascii=False, allow_nan=False)
        files.write_text(self.folder / RESULTS, text)
        return dict(json.loads(text))
