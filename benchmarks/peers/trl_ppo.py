"""TRL's PPOTrainer on prompts that were tokenized elsewhere: `python trl_ppo.py JOB.json ANSWER.json`.

Policy, reference, value model and reward model start from one folder; the last two get a scalar head at random. No
stop token is set, so that every response has the full length.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - loaded on demand, it would count as the trainer's memory
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Seconds of every update, CPU-seconds on a CPU: its sampling, all before the first minibatch, the minibatches."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.updates: list[dict[str, float]] = []
        self.began = self.sampling_s = 0.0
        self.training_since: float | None = None

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.now()
        assert self.training_since is not None
        times = {"update_s": now - self.began, "sampling_s": self.sampling_s, "train_s": now - self.training_since}
        self.updates.append(times | {"rollout_s": self.training_since - self.began})
        self.began, self.training_since = now, None

    def watch(self, trainer: PPOTrainer, response_tokens: int) -> None:
        """Note when the trainer samples and when its first minibatch begins."""
        sample, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

        def timed_sample(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            sequences, logits = sample(*args, **kwargs)
            self.sampling_s = self.now() - start
            if logits.shape[1] != response_tokens:
                raise RuntimeError(f"responses of {logits.shape[1]} tokens where {response_tokens} were asked for")
            return sequences, logits

        @contextlib.contextmanager
        def timed_accumulate(*models: Any) -> Iterator[None]:
            if self.training_since is None:
                self.training_since = self.now()
            with accumulate(*models):
                yield

        ppo_trainer.batch_generation = timed_sample
        trainer.accelerator.accumulate = timed_accumulate


def config(job: dict[str, Any], folder: str) -> PPOConfig:
    batch = job["responses"]
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,  # with one accumulation step every minibatch is an optimizer step
        gradient_accumulation_steps=1,
        num_mini_batches=batch // job["minibatch_size"],
        num_ppo_epochs=job["epochs"],
        local_rollout_forward_batch_size=batch,
        total_episodes=batch * (job["updates"] + 1),
        response_length=job["response_tokens"],
        stop_token=None,
        temperature=1.0,
        learning_rate=job["learning_rate"],
        optim="adamw_torch_fused",
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=job["device"] == "cpu",
        seed=job["seed"],
        num_sample_generations=0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(asked: Path, answer: Path) -> None:
    job = json.loads(asked.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    libraries_mib = peak_mib()
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32) for _ in range(2))
    judge, value = (
        AutoModelForSequenceClassification.from_pretrained(job["folder"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    clock = Clock(job["device"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=config(job, folder),
            processing_class=AutoTokenizer.from_pretrained(job["folder"], padding_side="left"),
            model=policy,
            ref_model=reference,
            reward_model=judge,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
            callbacks=[clock],
        )
        clock.watch(trainer, job["response_tokens"])
        gc.collect()
        with contextlib.redirect_stdout(None):
            trainer.train()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    found = {"updates": clock.updates[1:], "trained": trained, "tokens": job["responses"] * job["response_tokens"]}
    found |= {"peak_mib": peak_mib(), "libraries_mib": libraries_mib}
    answer.write_text(json.dumps(found), encoding="utf-8")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
