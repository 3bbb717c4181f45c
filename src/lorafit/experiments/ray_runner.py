"""Runs trials on a Ray cluster, many at once. Its machines must see the experiment's folder under the same path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from lorafit.errors import CheckpointError, MissingExtraError
from lorafit.experiments.runner import Runner
from lorafit.experiments.trial import Notify, Result, Trial, finished, run_trial

RETRIES = 3
"""How often a trial whose machine was lost is begun again; it goes on from its last checkpoint."""


@final
class Ray(Runner):
    """Runs trials as tasks of a Ray cluster, each in a process of its own.

    Args:
        folder: the experiment's, which all machines see under this path.
        address: of the cluster ("auto", "ray://host:10001"); None for one on this machine, begun now.
        notify: is told which trials begin.
        cores: of a trial.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, folder: Path, address: str | None, notify: Notify, cores: float = 1) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError(
                "a cluster needs the package ray",
                found=f"no {error.name}",
                expected="ray 2.30 or newer",
                fix="pip install 'lorafit[ray]'",
            ) from error
        self._ray: Any = ray
        self._folder = folder.absolute()
        self._here = Path.cwd()
        self._notify = notify
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        # A process takes one trial and ends, so that its peak memory is the trial's own.
        self._task: Any = ray.remote(num_cpus=cores, max_retries=RETRIES, max_calls=1)(_run)

    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        done = [finished(trial, self._folder) for trial in trials]
        yield from (each for each in done if each is not None)
        open_ = [trial for trial, each in zip(trials, done, strict=True) if each is None]
        waiting = {self._task.remote(trial, str(self._folder), str(self._here)): trial for trial in open_}
        for trial in open_:
            self._notify(f"runs {trial.name}")
        try:
            while waiting:
                ready, _ = self._ray.wait(list(waiting), num_returns=1)
                trial = waiting.pop(ready[0])
                yield self._get(ready[0], trial)
        finally:
            for reference in waiting:
                self._ray.cancel(reference)

    def _get(self, reference: Any, trial: Trial) -> Result:
        known = self._ray.exceptions
        try:
            self._ray.get(reference)
        except known.RayTaskError as error:
            raise error.cause or error from None
        except (known.WorkerCrashedError, known.OutOfMemoryError, known.NodeDiedError) as error:
            from lorafit.experiments.running import given_up

            why = (str(error).strip().splitlines() or [""])[0]
            return given_up(trial, self._folder, f"its process was lost each time: {type(error).__name__}: {why}")
        return self._seen(trial)

    def _seen(self, trial: Trial) -> Result:
        result = finished(trial, self._folder)
        if result is None:
            raise CheckpointError(
                "a machine of the cluster ran a trial whose result cannot be seen from here",
                where=trial.folder(self._folder),
                expected="an output folder that all machines share, under the same path",
                fix="choose an output_dir on a shared file system",
            )
        return result


def _run(trial: Trial, folder: str, here: str) -> None:
    """The task; paths that are relative are so to the directory in which the command was given, where there is one."""
    if Path(here).is_dir():
        os.chdir(here)  # the process ends with its trial
    run_trial(trial, Path(folder), print)
