"""A newcomer's own conversations, language model and reward models, by the README's profile, to the report."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from classifiers import CHATML, LLAMA, QWEN, saved, tokenizer

from rrlhf.pipeline.check import check_sources
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_document
from rrlhf.pipeline.launch import call
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
[PROFILE] = re.findall(r"```yaml\n(model:\n  base: models/my-qwen.*?)```", README, re.DOTALL)
FEW = {
    "model.response_tokens": 12,
    "ppo.updates": 1,
    "ppo.prompts_per_update": 4,
    "ppo.train_layers": 1,
    "sft.train_layers": 1,
    "sft.epochs": 1,
    "evaluate.samples_per_prompt": 1,
}
WORDS = ["sun", "rain", "tea", "cat", "dog", "book", "tree", "song", "sea", "hill", "bread", "moon"]


@pytest.fixture
def mine(project, monkeypatch):
    """Lay out what the newcomer has; the models are tiny and random."""
    (project / "profiles" / "mine.yaml").write_text(PROFILE)
    draw, own, rows = random.Random(0), tokenizer(CHATML), []
    for number in range(200):
        prompt = [{"role": "user", "content": f"Say {number}."}]
        if number % 3 == 0:
            prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *prompt]
        good, bad = " ".join(draw.choices(WORDS, k=3)), "".join(draw.choices("xyzq ", k=8))
        rows.append({"prompt": prompt, "chosen": good, "rejected": f"{number} {bad}"})
    (project / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        vocab_size=len(own),
        eos_token_id=own.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(project / "models" / "my-qwen")
    own.save_pretrained(project / "models" / "my-qwen")
    for folder, make in (("helpful", QWEN), ("harmless", LLAMA)):
        saved(project / "models" / folder, make, max_position_embeddings=1024)
    monkeypatch.chdir(project)
    return project


def test_it_fits_on_a_page(mine):
    assert len(PROFILE.splitlines()) <= 25
    assert set(yaml.safe_load(PROFILE)) == {"model", "prepare", "reward", "ensemble"}


def test_every_stage_runs_as_the_profile_says(mine):
    params = load_params(mine, "mine", FEW)
    check_sources(Project(mine, "mine", params))
    folders = {}
    for node in nodes(params):
        out = mine / "out" / node.name
        out.mkdir(parents=True)
        inputs = {argument: folders[name] for argument, name in node.inputs.items()}
        call(key_document(node, {}), inputs=inputs, out=out, log=lambda row: None)
        folders[node.name] = out
    made = ("data", "sft", "reward", "given-0", "given-1", "ensemble", "ppo-single", "ppo-robust", "evaluate")
    assert set(folders) == {*made}
    judged = json.loads((folders["evaluate"] / "evaluation.json").read_text())
    assert {policy["name"] for policy in judged["policies"]} == {"sft", "single", "robust"}
    assert all(len(point["heads"]) == 2 for point in judged["curves"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_command_goes_from_nothing_to_the_report(mine):
    def rrlhf(*arguments):
        done = subprocess.run([sys.executable, "-m", "rrlhf", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    noise = ("--set", "limits.max_cut=1")  # random bytes, and so longer in the tokens of another model
    told = json.loads(rrlhf("run", "--profile", "mine", "--json", "--take-aliases", *noise))
    found = set(told["folders"]) - set(told["ran"])
    assert found in ({"given-0"}, {"reward"})  # the same model, side by side: whoever comes first reads it
    page = Path(told["report"]).read_text()
    assert "robust" in page
    again = json.loads(rrlhf("run", "--profile", "mine", "--json", *noise))
    assert again["ran"] == []
    assert "rrlhf-mine-reward-given" in rrlhf("lineage", "rrlhf-mine-policy@candidate", "--profile", "mine")
    rrlhf("audit", "--deep")
    for name in ("rrlhf-mine-ensemble@latest", "rrlhf-mine-reward-given/1"):
        rrlhf("evaluate-reward", name, "--profile", "mine", "--perturb", "1", "--limit", "4")
