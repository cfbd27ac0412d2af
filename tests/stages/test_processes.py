"""A training in several processes, under `accelerate launch`, is the training in one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, save_random_heads
from safetensors.torch import load_file
from sharing_work import CASES, train_all
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rrlhf.config import Launch
from rrlhf.models.load import load_base
from rrlhf.pipeline.launch import _launcher, told_processes

ALIKE = ("score", "kl", "entropy", "policy_loss", "value_loss", "step_kl", "optimizer_steps", "gradient_norm", "loss")


@pytest.fixture
def bases(model, tmp_path):
    """A model that ties its two largest matrices, and one that runs whole and ties them too."""
    tokenizer, made = load_base(model).tokenizer, {}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    for name, config in {
        "tied": LlamaConfig(**TINY, tie_word_embeddings=True, **ids),
        "whole": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **ids),
    }.items():
        torch.manual_seed(0)
        made[name] = str(tmp_path / name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def jobs(model, ppo, bases, tmp_path):
    """What the launches are told, with a folder for what each writes."""
    rewards = [save_random_heads(tmp_path / str(heads), heads) for heads in (1, 5)]
    ppo = ppo.model_copy(update={"updates": 2})

    def job(processes):
        out = tmp_path / f"in-{processes}"
        out.mkdir()
        file = out / "job.json"
        described = {"model": model.model_dump(), "ppo": ppo.model_dump(), "out": str(out)}
        described |= {"rewards": [*map(str, rewards)], "bases": bases}
        file.write_text(json.dumps(described))
        return file

    train_all(model, ppo, rewards, bases, job(1).parent)
    return job


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_sample_and_train_what_one_does(processes, sharding, jobs):
    told = told_processes(
        Launch(processes=processes, sharding=sharding, threads=1, arms_at_once=1, runner="threads"), on_cpu=True
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | told
    file = jobs(processes)
    command = [sys.executable, *_launcher(processes), ROOT / "tests" / "sharing_work.py", file]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert ended.returncode == 0, ended.stderr

    alone, together = (
        json.loads((folder / "told.json").read_text()) for folder in (file.parents[1] / "in-1", file.parent)
    )
    assert {*alone} == {*together} == {*CASES, "sft", "dpo"}
    for name, told in alone.items():
        assert together[name]["responses"] == told["responses"], name
        assert together[name]["held"] == pytest.approx(1 / processes if sharding == "full" else 1, abs=0.05), name
        for row, other in zip(told["rows"], together[name]["rows"], strict=True):
            for metric in row.keys() & ALIKE:
                assert other[metric] == pytest.approx(row[metric], abs=1e-4, rel=1e-3), (name, metric)
        for weight, one in load_file(file.parents[1] / "in-1" / name).items():
            several = load_file(file.parent / name)[weight]
            torch.testing.assert_close(several, one, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
