"""Every stage on models that run whole, or in bfloat16, or with layers that run again: from base to comparison."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from rrlhf.models.load import load_base
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_document
from rrlhf.pipeline.launch import call
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.scoring import load_reward_model

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 102, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
GEMMA = transformers.Gemma3TextConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    **SIZES,
)
GPT2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **SIZES)
FEW = {"ppo.updates": 1, "reward.epochs": 2, "ensemble.epochs": 2, "ensemble.heads": 2, "reward.train_layers": 1}
WAYS = {
    "Gemma 3, adapters everywhere": (GEMMA, {"ppo.trains": "lora", "reward.trunk": "lora", "ensemble.kind": "lora"}),
    "Gemma 3, averaged reward models": (
        GEMMA,
        {"reward.trunk": "full", "ensemble.kind": "warm", "sft.temperature": 0.7},
    ),
    "GPT-2 as the trunk": (GEMMA, {"reward.base": GPT2, "sft.train_layers": 1, "dpo.train_layers": None}),
    "half the memory": (None, {"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "ppo.trains": "full"}),
}


def saved(config, folder, model):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_base(model).tokenizer.save_pretrained(folder)
    return str(folder)


SHORT = {"Gemma 3, adapters everywhere", "GPT-2 as the trunk"}


@pytest.mark.parametrize("way", [way if way in SHORT else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_every_stage_runs_it(way, start, model, tmp_path):
    config, overrides = WAYS[way]
    overrides = FEW | overrides
    if config:
        overrides["model.base"] = saved(config, tmp_path / "base", model)
    if "reward.base" in overrides:
        overrides["reward.base"] = saved(overrides["reward.base"], tmp_path / "trunk", model)
    params, folders = load_params(ROOT, "tiny", overrides), {"data": start / "data"}
    for node in nodes(params)[1:]:
        out, rows = tmp_path / node.name, []
        out.mkdir()
        inputs = {argument: folders[name] for argument, name in node.inputs.items()}
        call(key_document(node, {}), inputs=inputs, out=out, log=rows.append)
        folders[node.name] = out
    judged = json.loads((folders["evaluate"] / "evaluation.json").read_text())
    assert set(params.arms) < {policy["name"] for policy in judged["policies"]}
    asked = [[{"role": "user", "content": f"Say {number}."}] for number in range(3)]
    texts = ["Yes.", "A longer answer.", "No"]
    ensemble = load_reward_model(folders["ensemble"], folders["sft"])
    together, alone = (ensemble.score(asked, texts, size) for size in (3, 1))
    torch.testing.assert_close(
        together.mean, alone.mean, atol=2e-2 if model.dtype != params.model.dtype else 1e-4, rtol=1e-2
    )
