"""What two processes do together, and one alone, for the tests of this folder: `work.py TASK FOLDER`.

Started by `conftest.py` in processes of their own. Each task writes what it found into FOLDER/found.json, by process 0.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lorafit as lf
from lorafit.distributed import equalise, is_sharded, shard
from lorafit.sharded import is_part, share_state, whole, whole_state
from lorafit.state import load_state, save_state
from lorafit.training import ranks

STEPS = 8
KEPT = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
HOUSEHOLD: dict[str, lf.Method] = {
    "lora": lf.LoRA(r=4),
    "lora-plus": lf.LoRAPlus(r=4),
    "lora-fa": lf.LoRAFA(r=4),
    "vera": lf.VeRA(r=8, d_init=0.5),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=4), keep=KEPT),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2),
    "dora": lf.DoRA(lf.LoRA(r=4)),
    "delta-lora": lf.DeltaLoRA(r=4, start=3),
    "intrinsic": lf.IntrinsicDimension(d=50),
    "pissa": lf.LoRA(r=4, init="pissa"),
    "lora-drop-dora": lf.LoRADrop(lf.DoRA(lf.LoRA(r=4)), keep=KEPT),
    "dora-vera": lf.DoRA(lf.VeRA(r=8, d_init=0.5)),
    "lora-plus-adalora": lf.LoRAPlus(inner=lf.AdaLoRA(init_r=4, target_r=2)),
}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, tie_word_embeddings=tied, **size)
    return LlamaForCausalLM(config).to(dtype)


def batches(count: int = STEPS) -> list[Tensor]:
    """Two batches in turn, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randint(0, 61, (8, 12), generator=generator) for _ in range(2)]
    return [pair[step % 2] for step in range(count)]


class Course:
    """Some steps of training: alone ("one"), or in all processes ("ddp", "fsdp")."""

    def __init__(self, method: lf.Method, how: str, *, model: nn.Module | None = None, **options: Any) -> None:
        self.model = llama() if model is None else model
        self.handle = lf.attach(self.model, method, **{"seed": 3, **options})
        self.how = how
        self.wrapped: nn.Module = self.model
        self.world, self.rank = (1, 0) if how == "one" else (dist.get_world_size(), dist.get_rank())
        if how == "fsdp":
            shard(self.handle)
        elif how == "ddp":
            self.wrapped = DistributedDataParallel(self.model)
        self.optimizer = self.handle.optimizer(torch.optim.AdamW, lr=5e-3, total_steps=STEPS)
        self.losses: list[float] = []

    def loss(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.wrapped(input_ids=ids, labels=ids).loss
        return loss

    def train(self, data: list[Tensor], *, accumulated: int = 1) -> Course:
        for ids in data:
            mine = ids.chunk(self.world)[self.rank]
            total = torch.zeros(())
            for number, part in enumerate(mine.chunk(accumulated)):
                last = number == accumulated - 1
                if self.how == "fsdp":
                    self.model.set_requires_gradient_sync(last)
                loss = self.loss(part) / accumulated
                if self.how == "ddp" and not last:
                    with self.wrapped.no_sync():
                        loss.backward()
                else:
                    loss.backward()
                total += loss.detach()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.world > 1:
                dist.all_reduce(total)
            self.losses.append(float(total) / self.world)
        return self

    def deltas(self) -> dict[str, Tensor]:
        return {path: self.handle.delta(path) for path in self.handle.sites}

    def copies(self) -> dict[str, Tensor]:
        with whole(self.handle.copies.values()):
            return {
                f"{path}.{key}": value.detach().clone()
                for path, copy_ in self.handle.copies.items()
                for key, value in copy_.named_parameters()
            }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, as a part of the largest number."""
    size = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[key]).abs().max()) for key, value in one.items()) / size


def compared(one: Course, two: Course) -> dict[str, Any]:
    return {
        "loss": max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True)),
        "learnt": one.losses[0] - one.losses[-1],
        "delta": apart(one.deltas(), two.deltas()),
    }


def main_only(job: Callable[[], Any]) -> Any:
    return job() if dist.get_rank() == 0 else None


# Tasks ------------------------------------------------------------------------


def methods(folder: Path) -> dict[str, Any]:
    """Every method, trained alone and by two, saved by two and loaded by one."""
    found: dict[str, Any] = {}
    for name, method in HOUSEHOLD.items():
        one = Course(method, "one").train(batches())
        for how in ("ddp", "fsdp"):
            two = Course(method, how).train(batches())
            found[f"{name} {how}"] = row = compared(one, two)
            path = folder / f"{name}-{how}"
            if how == "fsdp":
                two.handle.save(path)
                assert (path / "adapter_model.safetensors").is_file()  # the others have waited for it
            else:
                main_only(partial(two.handle.save, path))
            deltas = two.deltas()
            if dist.get_rank() == 0:
                again = lf.load(llama(), path)
                row["loaded"] = apart(deltas, {key: again.delta(key) for key in again.sites})
                row["files"] = sorted(each.name for each in path.iterdir())
            row["same in both"] = _same(two)
            row["parts"] = sum(map(is_part, two.handle.parameters()))
            row["trained"] = len(two.handle.parameters())
            row["num_trainable"] = [one.handle.num_trainable, two.handle.num_trainable]
            row["facts"] = _facts(one) == _facts(two)
    return found


def _facts(course: Course) -> Any:
    with whole(course.handle.entries().values()):
        return None if course.handle.schedule is None else course.handle.schedule.facts()


def _same(course: Course) -> bool:
    """Whether both processes ended with the same adapter, bit for bit."""
    with whole(course.handle.entries().values()):
        entries = course.handle.entries().values()
        values = [tensor.detach().clone() for entry in entries for tensor in entry.parameters()]
    same = torch.ones(())
    for value in values:
        other = value.clone()
        dist.broadcast(other, 0)
        same *= float(torch.equal(other, value))
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same)


def shapes(folder: Path) -> dict[str, Any]:
    """Other models, other sites, accumulated batches, modules in full, what is not drawn alike."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[lf.Method, dict[str, Any], Callable[[], nn.Module]]] = {
        "everywhere": (lf.LoRA(r=4), {"targets": ".*(_proj|embed_tokens|lm_head)"}, llama),
        "head in full": (lf.LoRA(r=4), {"modules_to_save": ["lm_head"]}, llama),
        "head in full, subspace": (lf.IntrinsicDimension(d=50), {"modules_to_save": ["lm_head"]}, llama),
        "tied": (lf.DoRA(lf.LoRA(r=4)), {}, lambda: llama(tied=True)),
        "bfloat16": (lf.LoRA(r=4), {}, lambda: llama(dtype=torch.bfloat16)),
        "sequence": (lf.AdaLoRA(init_r=4, target_r=2), {}, plain),
    }
    for name, (method, options, build) in cases.items():
        one = Course(method, "one", model=build(), **options)
        for how in ("ddp", "fsdp"):
            two = Course(method, how, model=build(), **options)
            for course in (one, two) if how == "ddp" else (two,):
                course.train(batches())
            found[f"{name} {how}"] = row = compared(one, two)
            copies = one.copies()
            row["copies"] = apart(copies, two.copies()) if copies else 0.0
    one = Course(lf.AdaLoRA(init_r=4, target_r=2), "one").train(batches(), accumulated=4)
    for how in ("ddp", "fsdp"):
        two = Course(lf.AdaLoRA(init_r=4, target_r=2), how).train(batches(), accumulated=2)
        found[f"accumulated {how}"] = {**compared(one, two), "copies": 0.0}
        one_shared = Course(lf.IntrinsicDimension(d=50), "one").train(batches(), accumulated=4)
        two_shared = Course(lf.IntrinsicDimension(d=50), how).train(batches(), accumulated=2)
        found[f"accumulated subspace {how}"] = {**compared(one_shared, two_shared), "copies": 0.0}
    torch.manual_seed(dist.get_rank())  # what each draws for itself: that of the first counts
    drawn = llama()
    torch.manual_seed(dist.get_rank())
    handle = lf.attach(drawn, lf.VeRA(r=8))
    equalise(handle, torch.device("cpu"))
    key = next(iter(handle.adapter(next(iter(handle.sites))).common.buffers())).clone()
    dist.broadcast(key, 0)
    mine = next(iter(handle.adapter(next(iter(handle.sites))).common.buffers()))
    found["drawn apart"] = bool(torch.equal(key, mine))
    return found


@dataclass
class Output:
    loss: Tensor


class Opaque:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class plain(nn.Sequential):  # noqa: N801 (used as a function)
    """A model that names no blocks and has no lists."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(61, 16), nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 61))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = super().forward(input_ids)
        return self.output(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    output: Callable[[Tensor], Any] = Output


class hidden(plain):  # noqa: N801
    """The same with an output into which torch does not look."""

    output = Opaque


def state(folder: Path) -> dict[str, Any]:
    """A checkpoint of two processes goes on in one, and the other way round: optimizer, schedule, adapter."""
    found: dict[str, Any] = {}
    data = batches()
    for name in ("lora", "adalora", "delta-lora", "intrinsic", "lora-drop"):
        straight = Course(HOUSEHOLD[name], "one").train(data)
        for begun, ended in (("fsdp", "one"), ("one", "fsdp"), ("ddp", "fsdp")):
            first = Course(HOUSEHOLD[name], begun).train(data[:4])
            path = folder / f"{name}-{begun}-{ended}"
            if begun == "fsdp":
                save_state(first.handle, path)
            else:
                main_only(partial(save_state, first.handle, path))
            kept = whole_state(first.optimizer.state_dict())
            main_only(partial(torch.save, kept, path / "optimizer.pt"))
            dist.barrier()
            second = Course(HOUSEHOLD[name], ended)
            load_state(second.handle, path)
            second.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
            share_state(second.optimizer)
            second.train(data[4:])
            second.losses = first.losses + second.losses
            found[f"{name} {begun} {ended}"] = compared(straight, second)
            dist.barrier()
    return found


def refused(folder: Path) -> dict[str, Any]:
    """What cannot be, and what is said."""
    found: dict[str, Any] = {}

    def said(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # all of them are told
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = ["nothing", ""]

    model = llama()
    handle = lf.attach(model, lf.LoRA(r=4), seed=0)
    units = shard(handle)
    found["units"] = units
    found["sharded"] = is_sharded(handle)
    said("attach", lambda: lf.attach(model, lf.LoRA(r=4), name="second"))
    said("load", lambda: lf.load(model, folder / "nothing"))
    said("twice", lambda: shard(handle))
    said("merge", handle.merge)
    said("merge and detach", handle.merge_and_detach)
    said("detach", handle.detach)
    said("deepcopy", lambda: copy.deepcopy(model))
    with torch.no_grad():
        ids = batches(1)[0]
        full = model(input_ids=ids).logits
        found["freed after evaluation"] = all(map(is_part, model.parameters()))
        with handle.disabled():
            found["disabled"] = bool(torch.equal(model(input_ids=ids).logits, llama()(input_ids=ids).logits))
        found["not merged"] = bool(torch.equal(model(input_ids=ids).logits, full))
    late = lf.attach(llama(), lf.LoRA(r=4))
    optimizer = late.optimizer(torch.optim.SGD, lr=0.1)
    said("optimizer first", lambda: shard(late))
    del optimizer
    unseen = Course(lf.LoRA(r=4), "fsdp", model=hidden())
    said("backward pass", lambda: unseen.train(batches(1)))
    merged = lf.attach(llama(), lf.LoRA(r=4))
    merged.merge()
    said("merged", lambda: shard(merged))
    said("blocks", lambda: shard(lf.attach(llama(), lf.LoRA(r=4)), blocks=["LlamaDecodrLayer"]))
    rows = llama()
    lf.quantise(rows)
    said("quantised", lambda: shard(lf.attach(rows, lf.LoRA(r=4))))
    readonly = folder / "file"
    if dist.get_rank() == 0:
        readonly.write_text("")
    dist.barrier()
    said("cannot be written", lambda: handle.save(readonly / "adapter"))
    found["both"] = _from_both(found["cannot be written"][0])
    return found


def _from_both(text: str) -> list[str]:
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


TASKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "methods": methods,
    "shapes": shapes,
    "state": state,
    "refused": refused,
}


def main() -> None:
    task, folder = TASKS[sys.argv[1]], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("error", lf.LorafitWarning)
    dist.init_process_group("gloo")
    found = task(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run: taking Python down around them has ended a finished process by a signal
