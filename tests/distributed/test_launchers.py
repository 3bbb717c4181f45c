"""Other ways to start several processes: a rendezvous of two agents, accelerate, Ray Train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import arguments, environment, free_port, records

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
SHORT: dict[str, Any] = {"max_steps": 4, "samples": 0, "general": "none", "per_device_train_batch_size": 4}


def done_by_two(folder: Path) -> None:
    resolved = records(folder, "config")[0]["resolved"]
    assert resolved["processes"] == 2 and resolved["records_per_step"] == 8
    assert records(folder, "end")[0]["status"] == "done" and len(records(folder, "step")) == 4
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_rendezvous_of_two(place: Path) -> None:
    end = f"127.0.0.1:{free_port()}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", end, "--local-addr", "127.0.0.1"]
    words = [*agent, "-m", "lorafit", "train", *arguments(output_dir="rendezvous", **SHORT, shard=True)]
    agents = [
        subprocess.Popen(words, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [each.communicate(timeout=200) for each in agents]
    assert all(each.returncode == 0 for each in agents), said
    assert sum("4 steps of 8 records" in out for out, _ in said) == 1
    done_by_two(place / "rendezvous")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate(place: Path, name: str) -> None:
    words = arguments(output_dir=f"accelerate-{name}", **SHORT, shard=name == "fsdp2")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"{name}.yaml")]
    launcher += ["--main_process_port", str(free_port()), "-m", "lorafit", "train"]
    done = subprocess.run(
        [*launcher, *words], cwd=place, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done_by_two(place / f"accelerate-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_ray_train(place: Path, shard: bool) -> None:
    pytest.importorskip("ray.train")
    folder = place / f"ray-{shard}"
    settings = {**SHORT, "model": str(place / "model"), "data": str(place / "sums.jsonl"), "output_dir": str(folder)}
    settings |= {"eval_split": 12, "shard": shard}
    code = f"import ray_train; print(ray_train.main(2, False, {settings!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "'status': 'done', 'steps': 4" in done.stdout
    assert done.stdout.count("4 steps of 8 records") == 1
    done_by_two(folder)


def test_the_configurations_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.stem: str(load_config_from_file(str(path)).distributed_type) for path in EXAMPLES.glob("*.yaml")}
    assert {name: kind.rpartition(".")[2] for name, kind in kinds.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "MULTI_GPU",
        "deepspeed_zero2": "DEEPSPEED",
    }
