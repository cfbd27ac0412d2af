import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rrlhf.config import Sft
from rrlhf.data.tables import write_tables
from rrlhf.models.load import load_base
from rrlhf.models.processes import accelerator
from rrlhf.models.text import Texts
from rrlhf.policy.answers import Answers, answer
from rrlhf.policy.learner import top_layers, with_optimizer
from rrlhf.stages import sft as stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(model):
    return model.model_copy(update={"base": "random:2x32", "response_tokens": 16})


@pytest.fixture
def settings():
    return Sft(
        temperature=1.0,
        train_layers=None,
        epochs=2,
        batch_size=4,
        microbatch_size=4,
        learning_rate=1e-3,
        max_grad_norm=1.0,
    )


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"Say {n}"}], "response": f"number {n}!"} for n in range(10)]
    write_tables(folder, (("sft", each) for each in rows))
    return folder


def said(language, model, *texts):
    """Responses as answers."""
    return [answer(Texts(language, model), [{"role": "user", "content": text}], text) for text in texts]


def loss(language, model, rows, train_layers=None):
    """The summed loss of answers."""
    engine = accelerator(model)
    top = top_layers(language, engine.device, train_layers)
    answers = Answers(with_optimizer(engine, language, top, 1e-3, 1), rows, model)
    return -answers.logprobs(top, range(len(rows))).sum().item()


def test_the_loss_counts_the_completion_and_its_end_only(model):
    language = load_base(model)
    [example] = said(language, model, "one")
    assert example.tokens[-1] == language.end
    with torch.no_grad():
        logprobs = language.network(torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    counted = range(example.prompt_length, len(example.tokens))
    expected = -sum(logprobs[i - 1, example.tokens[i]].item() for i in counted)
    assert loss(language, model, [example]) == pytest.approx(expected, rel=1e-5)


def test_padding_never_matters(model):
    language = load_base(model)
    both = said(language, model, "a", "bcdefgh")
    alone = sum(loss(language, model, [one]) for one in both)
    assert loss(language, model, both) == pytest.approx(alone, rel=1e-5)


def test_the_demonstrations_become_likelier(model, settings, data, tmp_path):
    rows = []
    stage.run(seed=0, model=model, sft=settings, data=data, out=tmp_path, log=rows.append)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0] == {"step": 0, "cut_prompts": 0.0, "cut_responses": 0.0}
    assert rows[-1]["loss"] < rows[1]["loss"]


def test_a_demonstration_that_is_cut_teaches_no_end(model):
    language = load_base(model)
    [example] = said(language, model, "x" * model.response_tokens)
    assert language.end not in example.tokens[example.prompt_length :]
    assert len(example.tokens) - example.prompt_length == model.response_tokens


def test_a_sharpened_model_says_at_temperature_1_what_it_said_at_another(model):
    plain, sharp = load_base(model), load_base(model)
    stage.sharpen(sharp, 0.7)
    tokens = torch.tensor([[5, 9, 12, 7]])
    with torch.no_grad():
        torch.testing.assert_close(sharp.network(tokens).logits, plain.network(tokens).logits / 0.7)


def test_frozen_layers_read_once_give_the_loss_of_the_whole_model(model):
    language = load_base(model)
    examples = said(language, model, "one", "three")
    assert loss(language, model, examples, train_layers=1) == pytest.approx(loss(language, model, examples), rel=1e-5)


def test_layers_below_those_that_train_stay_as_they_were(model, settings, data, tmp_path):
    few = settings.model_copy(update={"train_layers": 1})
    rows = []
    stage.run(seed=0, model=model, sft=few, data=data, out=tmp_path, log=rows.append)
    assert rows[-1]["loss"] < rows[1]["loss"]
    before, after = load_base(model).network.state_dict(), load_file(tmp_path / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {"1"}
    assert not any("embed" in name or "lm_head" in name for name in changed)


def test_accumulated_gradients_train_the_same_model(model, settings, data, tmp_path):
    weights = []
    for size in (4, 1):
        out = tmp_path / str(size)
        out.mkdir()
        accumulating = settings.model_copy(update={"microbatch_size": size})
        stage.run(seed=0, model=model, sft=accumulating, data=data, out=out, log=lambda row: None)
        weights.append(load_file(out / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_process_of_its_own_and_two_processes_train_the_same_model(model, settings, data, tmp_path):
    document = {
        "stage": "sft",
        "params": {"seed": 0, "model": model.model_dump(), "sft": settings.model_dump()},
    }
    weights = []
    for processes, beside, sharding in ((1, 0, "none"), (1, 1, "none"), (2, 0, "none"), (2, 0, "full")):
        out = tmp_path / f"out{processes}{beside}{sharding}"
        out.mkdir()
        program = (
            "import json, sys; from pathlib import Path;"
            "from rrlhf.config import Launch; from rrlhf.pipeline.launch import execute;"
            "job = json.loads(sys.argv[1]);"
            "execute(job['document'], inputs={'data': Path(job['data'])}, out=Path(job['out']), "
            " launch=Launch(**job['launch']), beside=job['beside'])"
        )
        job = {"document": document, "data": str(data), "out": str(out), "beside": beside}
        job["launch"] = {
            "processes": processes,
            "sharding": sharding,
            "threads": 1,
            "arms_at_once": 1,
            "runner": "threads",
        }
        subprocess.run([sys.executable, "-c", program, json.dumps(job)], check=True, cwd=ROOT, timeout=240)
        weights.append(load_file(out / "model.safetensors"))
        assert sum('"loss"' in line for line in (out / "history.jsonl").read_text().splitlines()) == 6
    one, alone, two, sharing = weights
    for name, tensor in one.items():
        assert torch.equal(alone[name], tensor)
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(sharing[name], tensor, atol=2e-5, rtol=1e-3)
    start = load_base(model).network.state_dict()
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
