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
from rrlhf.pipeline.launch import launcher, told_processes


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
def trained(model, ppo, bases, tmp_path):
    """Train by every method; return a folder with what came out."""
    rewards = [save_random_heads(tmp_path / str(heads), heads) for heads in (1, 5)]
    ppo = ppo.model_copy(update={"updates": 2})

    def train(processes, sharding="none", dtype="float32"):
        out, ours = tmp_path / f"{sharding}-{processes}", model.model_copy(update={"dtype": dtype})
        out.mkdir()
        if processes == 1:
            train_all(ours, ppo, rewards, bases, out)
            return out
        described = {"model": ours.model_dump(), "ppo": ppo.model_dump(), "out": str(out)}
        described |= {"rewards": [*map(str, rewards)], "bases": bases}
        (out / "job.json").write_text(json.dumps(described))
        launch = Launch(processes=processes, sharding=sharding, threads=1, arms_at_once=1, runner="threads")
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | told_processes(launch, on_cpu=True)
        command = [sys.executable, *launcher(processes), ROOT / "tests" / "sharing_work.py", out / "job.json"]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
        assert ended.returncode == 0, ended.stderr
        return out

    return train


def assert_alike(one, other, absolute, relative):
    """Compare what two launches sampled, told and trained; return what each of them told."""
    told, others = (json.loads((folder / "told.json").read_text()) for folder in (one, other))
    assert {*told} == {*others} == {*CASES, "sft", "dpo"}
    for name, each in told.items():
        assert others[name]["responses"] == each["responses"], name
        for row, beside in zip(each["rows"], others[name]["rows"], strict=True):
            for metric in row.keys() - {"tokens_per_second"}:
                assert beside[metric] == pytest.approx(row[metric], abs=absolute, rel=relative), (name, metric)
        weights = load_file(other / name)
        for weight, expected in load_file(one / name).items():
            message = f"{name}: {weight}"
            torch.testing.assert_close(weights[weight], expected, atol=absolute, rtol=relative, msg=message)
    return told, others


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_sample_and_train_what_one_does(processes, sharding, trained):
    _, together = assert_alike(trained(1), trained(processes, sharding), 1e-4, 1e-3)
    for name, told in together.items():
        assert told["held"] == pytest.approx(1 / processes if sharding == "full" else 1, abs=0.05), name


@pytest.mark.slow
def test_in_bfloat16_processes_that_share_the_weights_train_as_those_that_hold_all(trained):
    assert_alike(*(trained(2, sharding, "bfloat16") for sharding in ("none", "full")), 1e-5, 1e-5)
