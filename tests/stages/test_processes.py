"""PPO in two processes, under `accelerate launch`, is PPO in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_random_heads
from safetensors.torch import load_file

from rrlhf.pipeline.launch import _launcher

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from rrlhf.config import typed_arm, Model, Ppo
from rrlhf.models.load import accelerator, load_base
from rrlhf.models.rollout import Samples
from rrlhf.policy.reward import Prompts, arm_reward, load_reward_models
from rrlhf.policy.learner import Learner, prepare_learner
from rrlhf.stages.ppo import train

model, ppo, out = Model(**json.loads(sys.argv[1])), Ppo(**json.loads(sys.argv[2])), Path(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
engine = accelerator(model)
rank, processes = engine.process_index, engine.num_processes
assert processes == int(sys.argv[4])
alone = Learner.sample

def sample(learner, prompts):  # each process samples the prompts of all of them and keeps its own
    everyone = [prompt for together in zip(*gather_object([prompts])) for prompt in together]
    *fields, states, top = alone(learner, everyone)
    own = slice(rank, None, processes)
    return Samples(*(field[own] for field in fields), {layer: each[own] for layer, each in states.items()}, top[own])

Learner.sample = sample
rewards = load_reward_models(Path(sys.argv[5]), Path(sys.argv[6]), engine.device)
learner = prepare_learner(engine, load_base(model), rewards, model=model, ppo=ppo, seed=0)
learner.generator.manual_seed(0)
arm = typed_arm(reward="batch_robust", nominal_weight=0.4, credible=2.0, seed=0)
rows = [row for row, _ in train(learner, Prompts([[3, 9, 12], [4, 7, 8, 20], [5, 30, 31]]), arm_reward(arm, engine))]
if engine.is_main_process:
    save_file({name: weight.detach().contiguous() for name, weight in learner.top.named_parameters()}, out)
    print(json.dumps(rows), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["layers", "full"])
def test_two_processes_train_the_policy_that_one_does(model, ppo, tmp_path, trains):
    """A whole rollout is one minibatch, for each process has an order of its own."""
    program, rewards = tmp_path / "program.py", [save_random_heads(tmp_path / str(heads), heads) for heads in (1, 5)]
    program.write_text(PROGRAM)
    ppo = ppo.model_copy(update={"minibatch_size": ppo.prompts_per_update, "trains": trains})

    def trained(processes):
        out = tmp_path / f"{processes}.safetensors"
        launched = [*_launcher(processes), program] if processes > 1 else [program]
        settings = [model.model_dump_json(), ppo.model_dump_json(), out, str(processes), *rewards]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        told = subprocess.run(
            [sys.executable, *launched, *settings],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=240,
        )
        assert told.returncode == 0, told.stderr
        return load_file(out), json.loads(next(line for line in told.stderr.splitlines() if line.startswith("[{")))

    (one, rows), (two, others) = trained(1), trained(2)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4)
    for row, other in zip(rows, others, strict=True):
        for name in ("score", "kl", "entropy", "policy_loss", "value_loss", "step_kl", "gradient_norm", "nominal"):
            assert other[name] == pytest.approx(row[name], abs=1e-4, rel=1e-3), name
