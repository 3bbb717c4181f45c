"""What a run measures of itself on its way: the loss on fixed noises, and sheets of samples."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lorafit.diffusion.drawing import draw, sheet, write_png
from lorafit.diffusion.family import Family
from lorafit.diffusion.folder import RunFolder
from lorafit.diffusion.heldout import Held, mean
from lorafit.diffusion.pools import Prompts
from lorafit.diffusion.settings import Settings
from lorafit.training.record import Recorder
from lorafit.training.verdict import Evaluation, Verdict, Ways, judge

RECENT = 20
"""So many of the last steps' losses are the training loss of a verdict."""
WAYS = Ways(
    stop="a smaller max_steps",
    longer="max_steps",
    often="evaluate_every",
    look="look at the pictures and the prompt",
    hold="measure on more pairs of picture and noise (evaluation_draws)",
)
"""What hints call the ways to change a run."""
OTHERS = replace(WAYS, hold="hold out more pictures (eval_images)")
"""The same where it is judged by pictures that it does not learn."""


@final
class Watch:
    """Measures, draws, records, and remembers what the verdict needs.

    Args:
        settings: of the run.
        family: of the pipeline.
        prompts: encodes what is shown.
        subject: fixed noises for the subject.
        prior: those for the class, or None.
        folder: the run's.
        recorder: the run's.
    """

    def __init__(
        self,
        settings: Settings,
        family: Family,
        prompts: Prompts,
        subject: Held,
        prior: Held | None,
        folder: RunFolder,
        recorder: Recorder,
    ) -> None:
        self._settings = settings
        self._family = family
        self._prompts = prompts
        self._subject = subject
        self._prior = prior
        self._folder = folder
        self._recorder = recorder
        self.evaluations: list[Evaluation] = []
        self.priors: list[tuple[int, float]] = []
        self.seconds_per_picture = 0.0
        # What is said of the subject by other pictures of it rests on so many pictures, however many noises each is
        # measured under; what is said of the learnt pictures themselves rests on the noises.
        self._draws = 1 if settings.eval_images is None else settings.evaluation_draws
        self._recent: deque[float] = deque(maxlen=RECENT)

    # Measuring

    def evaluated(self, step: int) -> bool:
        """Whether this step was the last one to be measured."""
        return bool(self.evaluations) and self.evaluations[-1].step == step

    def evaluate(self, step: int) -> float:
        """Measures the loss after so many steps; how long a picture took is in `seconds_per_picture`."""
        started = time.perf_counter()
        losses = self._subject.losses(self._family, self._prompts)
        seconds = time.perf_counter() - started
        self.seconds_per_picture = seconds / len(losses)
        found = self._evaluation(step, losses)
        self.evaluations.append(found)
        other = None
        if self._prior is not None:
            other = mean(self._prior.losses(self._family, self._prompts))
            self.priors.append((step, other))
        self._recorder.write("evaluation", step=step, loss=found.mean, prior_loss=other, seconds=seconds)
        return found.mean

    def _evaluation(self, step: int, losses: Sequence[float]) -> Evaluation:
        """With a record for each unit that was drawn."""
        draws = self._draws
        sums = [math.fsum(losses[start : start + draws]) for start in range(0, len(losses), draws)]
        return Evaluation.of(step, sums, [float(draws)] * len(sums))

    def learnt(self, loss: float) -> None:
        """Notes the subject's loss of a training step."""
        self._recent.append(loss)

    def verdict(self) -> Verdict | None:
        """What became of the run."""
        weighed = self._settings.min_snr is not None  # weighed losses are on another scale
        trained = None if weighed or not self._recent else mean(list(self._recent))
        return judge(self.evaluations, trained, ways=WAYS if self._settings.eval_images is None else OTHERS)

    # Drawing

    def sheet(self, step: int) -> None:
        """Draws the run's prompts as the pipeline now is."""
        settings = self._settings
        prompts, seeds = settings.prompts, list(range(settings.sample_count))
        if not seeds:
            return
        images = draw(
            self._family.pipe,
            prompts,
            seeds=seeds,
            steps=settings.sample_steps,
            guidance=settings.guidance,
            size=settings.resolution,
        )
        path = self._folder.sheet(step)
        write_png(sheet(images, columns=len(seeds)), path)
        self._recorder.write(
            "sheet",
            step=step,
            path=path.relative_to(self._folder.path).as_posix(),
            prompts=prompts,
            seeds=seeds,
            columns=len(seeds),
        )

    # Going on

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's types."""
        return {
            "evaluations": [[one.step, list(one.losses)] for one in self.evaluations],
            "priors": [list(one) for one in self.priors],
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        self.evaluations = [
            Evaluation.of(step, sums, [float(self._draws)] * len(sums)) for step, sums in state["evaluations"]
        ]
        self.priors = [(int(step), float(value)) for step, value in state.get("priors", [])]
        self._recent = deque(state.get("recent", []), maxlen=RECENT)
