"""TRL's RewardTrainer on tokens that were made elsewhere: `python trl_reward.py JOB.json ANSWER.json`."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

WARM_UP = 1  # optimizer steps


class Clock(TrainerCallback):
    """CPU-seconds of the training loop behind its first steps, and memory at its end."""

    started = seconds = peak_mib = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.started = time.process_time()
        self.seconds = time.process_time() - self.started
        self.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def config(job: dict[str, Any], folder: str) -> RewardConfig:
    return RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type=job["schedule"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["max_grad_norm"],
        optim="adamw_torch_fused",
        max_length=job["prompt_tokens"] + job["response_tokens"],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        seed=job["seed"],
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


@torch.no_grad()
def accuracy(model: Any, pairs: dict[str, list[list[int]]], pad: int) -> float:
    wins = []
    for chosen, rejected in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True):
        width = max(len(chosen), len(rejected))
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in (chosen, rejected)])
        counts = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in (chosen, rejected)])
        good, bad = model(input_ids=tokens, attention_mask=counts).logits.flatten().tolist()
        wins.append(good > bad)
    return sum(wins) / len(wins)


def main(asked: Path, answer: Path) -> None:
    job = json.loads(asked.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(job["folder"], num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=config(job, folder),
            train_dataset=Dataset.from_dict(job["train_ids"]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    pairs = len(job["train_ids"]["chosen_ids"]) * job["epochs"] - WARM_UP * job["batch_size"]
    found = {"pairs": pairs, "train_s": clock.seconds, "peak_mib": clock.peak_mib}
    found["accuracy"] = accuracy(trainer.model.eval(), job["heldout_ids"], tokenizer.pad_token_id)
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
