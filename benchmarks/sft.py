"""One run of TRL's SFTTrainer with PEFT, as its documentation shows it: `python -m benchmarks.sft FILE`.

FILE is JSON: model, data, steps, r, rate, batch, seed, save, folder, and `options` for SFTConfig. The times of the
steps go into `times.json` in `folder`; adapters are saved there every `save` steps.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quiet import quiet


def main(file: str) -> None:
    """Trains, and writes what it took."""
    with quiet():
        wanted = json.loads(Path(file).read_text(encoding="utf-8"))
        print(json.dumps(train(wanted)))


def conversation(record: dict[str, Any]) -> dict[str, Any]:
    """A question and its answer in TRL's conversational form of prompt and completion."""
    return {
        "prompt": [{"role": "user", "content": record["question"]}],
        "completion": [{"role": "assistant", "content": record["answer"]}],
    }


def train(wanted: dict[str, Any]) -> dict[str, Any]:
    """The run; the loss is on the completion alone."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.machine import resident

    class Times(TrainerCallback):
        """When each step ended, in seconds from the beginning of the first one."""

        def __init__(self) -> None:
            self.begun = 0.0
            self.ends: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun = self.begun or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter() - self.begun)

    lines = Path(wanted["data"]).read_text(encoding="utf-8").splitlines()
    dataset = Dataset.from_list([conversation(json.loads(line)) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype="float32")
    folder = Path(wanted["folder"])
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=wanted["steps"],
        learning_rate=wanted["rate"],
        lr_scheduler_type="linear",
        seed=wanted["seed"],
        save_strategy="steps",
        save_steps=wanted["save"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        completion_only_loss=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": wanted["batch"], "logging_steps": 1, **wanted["options"]},
    )
    adapter = LoraConfig(r=wanted["r"], lora_alpha=2 * wanted["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    times = Times()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[times],
    )
    trainer.train()
    return {"ends": times.ends, "peak": resident()["peak"], "tokens": _tokens(trainer)}


def _tokens(trainer: Any) -> float | None:
    """The tokens that were trained on, as TRL counts them."""
    counts = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    return counts[-1] if counts else None


if __name__ == "__main__":
    main(*sys.argv[1:])
