"""LoRA under your own `transformers.Trainer`: hand it the adapter's optimizer, and nothing else changes.

Run it with `python examples/transformers_trainer.py`: a few seconds. The model is a tiny Llama with random weights, so
that nothing is downloaded; put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorafit as lf


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up from a random start: 7 8 9 10 …"""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) + index * 5) % 60
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> tuple[float, float]:
    """Runs the example and returns the loss before and after."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)

    handle = lf.attach(model, lf.LoRA(r=16), targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=2e-2)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=16,
            num_train_epochs=12,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Counting(),
            eval_dataset=Counting(),
            optimizers=(optimizer, None),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        handle.save(f"{folder}/adapter")
        handle.detach()
        lf.load(model, f"{folder}/adapter")
        loaded = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f}; of the adapter loaded again {loaded:.3f}")
    return before, after


if __name__ == "__main__":
    main()
