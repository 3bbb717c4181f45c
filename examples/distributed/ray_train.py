"""`lorafit train` in the workers of a Ray cluster: Ray starts and joins them, and each takes its part of the run.

    python examples/distributed/ray_train.py --workers 2 --data my.jsonl --output-dir /shared/runs/my

The folder has to be one that all machines share. Settings beyond these go into SETTINGS, by the names of
`lorafit train`: {"shard": True} has every worker keep a part of the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4}


def work(settings: dict[str, Any]) -> None:
    """What every worker does. Ray has joined them by then, as torch's processes."""
    import ray.train
    from rich.console import Console

    from lorafit.training.config import resolve
    from lorafit.training.run import train

    first = ray.train.get_context().get_world_rank() == 0
    outcome = train(
        resolve([("ray_train.py", settings)]),
        command="ray_train.py",
        notify=lambda text: print(text, flush=True) if first else None,
        console=Console(quiet=True),
    )
    ray.train.report({"held_out_before": outcome.eval_before, "held_out_after": outcome.eval_after})


def main(workers: int, use_gpu: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs it, and gives the figures that the run's folder has at the end."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as place:
        trainer = TorchTrainer(
            work,
            train_loop_config={**SETTINGS, **settings, "use_cpu": not use_gpu},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(storage_path=place),  # for Ray's own notes; the run has its folder
        )
        trainer.fit()
    figures: dict[str, Any] = json.loads((Path(settings["output_dir"]) / "result.json").read_text())
    return {key: figures[key] for key in ("status", "steps", "eval_loss_before", "eval_loss_after")}


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    asked.add_argument("--data", required=True)
    asked.add_argument("--model")
    asked.add_argument("--output-dir", required=True)
    given = vars(asked.parse_args())
    number, gpu = given.pop("workers"), given.pop("gpu")
    print(main(number, gpu, {key: value for key, value in given.items() if value is not None}))
