"""Whatever settings may stand together run to a comparison, with the same bits after another past and interruptions."""

import json
import random

import pytest
import torch
from classifiers import GPT, LLAMA, QWEN, saved
from conftest import TINY, copy_project
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from rrlhf import stopping
from rrlhf.judging.evaluation import read_evaluation
from rrlhf.located import ParamsError
from rrlhf.models.load import load_base
from rrlhf.pipeline import launch
from rrlhf.pipeline.artifacts import content_digest, rows_of
from rrlhf.pipeline.check import check_sources
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project

LONG = {"max_position_embeddings": 256}
BASES = {  # as people bring them: weights in halves, several files, advice that transformers would not write
    "llama": (LlamaConfig(**TINY | LONG), torch.bfloat16, {"max_shard_size": "20KB"}),
    "gemma": (Gemma2Config(**TINY | LONG, head_dim=8, sliding_window=20), torch.float16, {}),
    "gpt": (GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256), torch.bfloat16, {}),
}
CLASSIFIERS = {"rm-llama": (LLAMA, LONG), "rm-qwen": (QWEN, LONG), "rm-gpt": (GPT, {"n_positions": 256})}
ARMS = [
    {"reward": "single"},
    {"reward": "mean", "functions": {"rules:short": 0.5}},
    {"reward": "robust", "nominal_weight": 0.4, "credible": 8.0},
    {"reward": "batch_robust", "nominal_weight": 0.0, "credible": 2.0},
    {"reward": "ellipsoid", "credible": 2.0},
    {"reward": "gaussian_entropic", "temperature": 0.5},
    {"reward": "uwo", "uncertainty_weight": 0.5},
    {"method": "dpo"},
    {"method": "best_of_n", "reward": "lower_bound", "uncertainty_weight": 1.0, "n": 2},
]
SETTINGS = {
    "model.base": ["random:2x32", *BASES],
    "model.dtype": ["float32", "bfloat16"],
    "model.save_dtype": ["auto", "float32", "bfloat16"],
    "model.attn_implementation": ["auto", "eager"],
    "model.gradient_checkpointing": [True],
    "model.system_prompt": ["Be kind."],
    "sft.temperature": [0.7],
    "sft.train_layers": [None, 1],
    "sft.keep_states": [True, False],
    "sft.microbatch_size": [1, 3],
    "reward.base": [None, "gpt", *CLASSIFIERS],
    "reward.head": ["trained", "own"],
    "reward.trunk": ["frozen", "lora", "full"],
    "reward.batch_size": [1, 5],
    "reward.dro_temperature": [None, 0.5],
    "ensemble.kind": ["heads", "members", "lora", "warm"],
    "ensemble.freeze_backbone": [True, False],
    "ensemble.hidden": [0, 4],
    "ensemble.loss": ["reparam_mse", "gaussian_nll", "bradley_terry"],
    "ensemble.target": ["stage1_reward", "margin"],
    "ensemble.sigma": ["posterior", "learned"],
    "ppo.responses_per_prompt": [1, 2],
    "ppo.minibatch_size": [1, 8],
    "ppo.microbatch_tokens": [1, 100],
    "ppo.trains": ["layers", "lora", "full"],
    "ppo.kl_estimator": ["k2", "k3"],
    "ppo.kl_in": ["reward", "loss"],
    "ppo.kl_target": [None, 2.0],
    "ppo.max_kl": [None, 0.001],
    "ppo.estimator": ["gae", "rloo", "grpo", "reinforce++"],
    "ppo.learning_rate": [1e-4, 0.1],
    "dpo.loss": ["sigmoid", "ipo"],
    "dpo.train_layers": [None, 2],
    "dpo.keep_states": [True, False],
    "evaluate.judge": [None, {"base": "rm-qwen"}],
}
ALWAYS = {"reward.train_layers": 1, "limits.max_cut": 1.0, "arms.direct": None, "arms.choosy": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """A project in whose folder lie models as people have them, and a reward function."""
    made = copy_project(tmp_path_factory.mktemp("any") / "project")
    tokenizer = load_base(model).tokenizer
    for name, (config, dtype, how) in BASES.items():
        config.update({"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(made / name, **how)
        tokenizer.save_pretrained(made / name)
        (made / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "temperature": 0.9}))
    for name, (make, further) in CLASSIFIERS.items():
        saved(made / name, make, **further)
    (made / "rules.py").write_text(
        "def short(completions, **_):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    return made


def interrupted(recorder, rows):
    """A recorder whose log asks the stage to stop once it was told so many rows."""

    def begin(*arguments):
        log, left = recorder(*arguments), iter(range(rows))

        def record(row):
            log(row)
            if next(left, None) is None:
                stopping.stop.set()

        return record

    return begin


def again(document, inputs, out, launched, chance):
    """Run a stage where the process's random numbers are elsewhere, and interrupt it up to twice."""
    torch.manual_seed(chance.randrange(100))
    random.seed(chance.randrange(100))
    for rows in (chance.randrange(4), chance.randrange(4), 10**6):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(launch, "recorder", interrupted(launch.recorder, rows))
            try:
                return launch.execute(document, inputs=inputs, out=out, launch=launched)
            except stopping.Interrupted:
                pass
            finally:
                stopping.stop.clear()
    raise AssertionError("it was interrupted a third time")


def told(folder):
    """Return what a stage logged, but for clocks."""
    return [{**row, "seconds": 0, "tokens_per_second": 0} for row in rows_of(folder)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    changed=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in SETTINGS.items()}),
    arms=st.tuples(st.sampled_from([arm for arm in ARMS if arm.get("method") != "best_of_n"]), st.sampled_from(ARMS)),
    chance=st.randoms(use_true_random=False),
)
def test_any_settings_run_and_give_the_same_bits_again(root, monkeypatch, tmp_path_factory, changed, arms, chance):
    monkeypatch.chdir(root)
    overrides = ALWAYS | changed | {"arms.single": arms[0], "arms.robust": arms[1], "tracking.candidate": "single"}
    try:
        project = Project(root, "tiny", load_params(root, "tiny", overrides))
        check_sources(project)
    except ParamsError:
        assume(False)
    made, contents, out = {}, {}, tmp_path_factory.mktemp("out")
    for node in project.nodes:
        document = project.document(node, {name: content_digest(files) for name, files in contents.items()})
        inputs = {argument: made[name] for argument, name in node.inputs.items()}
        made[node.name] = out / node.name
        launch.execute(document, inputs=inputs, out=made[node.name], launch=project.params.launch)
        again(document, inputs, out / f"{node.name}-again", project.params.launch, chance)
        contents[node.name], twice = (project.store.digests(out / f"{node.name}{end}") for end in ("", "-again"))
        assert content_digest(twice) == content_digest(contents[node.name]), node.name
        assert told(out / f"{node.name}-again") == told(made[node.name]), node.name
    rounding = 0.5 if project.params.model.dtype == "bfloat16" else 2e-3
    [start] = [policy for policy in read_evaluation(made["evaluate"]).policies if policy.name == "sft"]
    trained = [rows_of(made[node.name]) for node in project.nodes if node.stage == "ppo"]
    assert max(map(abs, [start.metrics["kl"].mean, *(rows[0]["kl"] for rows in trained)])) < rounding
