"""One look at the models before anything runs: all mistakes at once, without weights, and remembered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rrlhf.located import ParamsError
from rrlhf.memo import Memo
from rrlhf.models.load import load_base, save_model
from rrlhf.pipeline.check import check_models, check_sources
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project

ROOT = Path(__file__).parents[2]
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(model, tmp_path):
    save_model(load_base(model), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def look(folder, tmp_path):
    """Check the tiny profile with that base and some changes; return mistakes and notes."""

    def check(**changed):
        overrides = {name.replace("__", "."): value for name, value in changed.items()}
        params = load_params(ROOT, "tiny", {"model.base": str(folder)} | overrides)
        return check_models(params, tmp_path, Memo(tmp_path / "memo.json"), fetch=False)

    return check


def test_a_model_that_fits_its_settings_is_fine(look):
    assert look() == ([], [])


def test_all_mistakes_are_told_at_once(look):
    mistakes, _ = look(reward__layer=4, ppo__train_layers=5, dpo__train_layers=9, model__prompt_tokens=501)
    assert [line.partition(":")[0] for line in mistakes if "train_layers" in line or "reward.layer" in line] == []
    [context] = mistakes  # of a model that cannot be used no layers are counted
    assert "made for 512 tokens (max_position_embeddings), and prompt and response take 513" in context
    mistakes, _ = look(reward__layer=4, sft__train_layers=4, ppo__train_layers=5, dpo__train_layers=9)
    assert mistakes == [
        "sft.train_layers 4: the model has 3 layers; set it to at most that",
        "ppo.train_layers 5: the model has 3 layers; set it to at most that",
        "dpo.train_layers 9: the model has 3 layers; set it to at most that",
        "reward.layer 4: the model has 3 layers; set it to at most that",
    ]


def test_layers_are_counted_for_what_is_to_run_only(look):
    ppo_alone = {"direct": None, "choosy": None}
    assert look(dpo__train_layers=9, arms=ppo_alone)[0] == []
    assert look(ppo__train_layers=9, ppo__trains="full")[0] == []


def test_a_reward_models_own_base_is_looked_at_as_well(look, tmp_path, model):
    save_model(load_base(model.model_copy(update={"base": "random:2x32"})), tmp_path / "other")
    mistakes, _ = look(reward__base=str(tmp_path / "other"), reward__layer=3)
    assert mistakes == ["reward.layer 3: the model has 2 layers; set it to at most that"]
    mistakes, _ = look(reward__base=str(tmp_path / "other"), reward__response_tokens=500)
    assert "reward.base" in mistakes[0]
    assert "made for 512 tokens" in mistakes[0]


def test_adapters_need_maps_to_stand_beside(look):
    assert look(ppo__trains="lora", ppo__lora_targets=["q_proj", "down_proj"]) == ([], [])
    [mistake], _ = look(ppo__trains="lora", ppo__lora_targets=["q_proj", "c_attn"])
    assert mistake == (
        "ppo.lora_targets: no map of the model is named c_attn; "
        "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert look(ppo__lora_targets=["c_attn"]) == ([], [])


def test_a_system_turn_that_the_template_refuses_is_told(look, folder):
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    assert look() == ([], [])
    [mistake], _ = look(model__system_prompt="Rhyme.")
    assert mistake.endswith("refuses a system turn (no system role); set model.system_prompt to null")


def test_a_prompt_limit_that_holds_nothing_is_told(look):
    [mistake], _ = look(model__prompt_tokens=3)
    assert mistake.startswith("model.prompt_tokens 3 leaves no room for a prompt")


def test_what_a_template_lacks_or_prints_is_noted(look, folder):
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    mistakes, notes = look(model__date="2031-02-03")
    assert mistakes == []
    assert "prints today's date, which is pinned to model.date, 2031-02-03" in notes[0]
    assert "writes nothing where the assistant begins" in notes[1]
    (folder / "chat_template.jinja").unlink()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "brings no chat template" in look()[1][0]


def test_what_is_known_of_a_base_needs_neither_torch_nor_its_files_again(folder, tmp_path, project):
    overrides = {"model.base": str(folder)}
    check_sources(Project(project, "tiny", load_params(project, "tiny", overrides)))
    code = (
        "import sys; from pathlib import Path\n"
        "from rrlhf.pipeline.params import load_params; from rrlhf.pipeline.plan import Project\n"
        "from rrlhf.pipeline.check import check_sources\n"
        f"check_sources(Project(Path('.'), 'tiny', load_params(Path('.'), 'tiny', {overrides!r})))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_changed_base_is_looked_at_again(folder, project):
    params = load_params(project, "tiny", {"model.base": str(folder)})
    check_sources(Project(project, "tiny", params))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ParamsError, match="are not in its file, so they would be drawn at random"):
        check_sources(Project(project, "tiny", params))


@pytest.mark.parametrize("base", ["random:2", "random:0x32", "random:axb"])
def test_a_random_model_is_named_by_its_sizes(project, base):
    with pytest.raises(ParamsError, match="write random:LAYERSxWIDTH"):
        check_sources(Project(project, "tiny", load_params(project, "tiny", {"model.base": base})))


def test_a_model_that_is_not_here_is_looked_at_by_the_run_alone(tmp_path):
    params = load_params(ROOT, "tiny", {"model.base": "nobody/nothing", "model.revision": "0" * 40})
    found = check_models(params, tmp_path, Memo(tmp_path / "memo.json"), fetch=False)
    assert found == ([], ["model.base nobody/nothing: not looked at, its files are not here; a run does first"])


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_cluster_whose_package_is_not_installed_is_told_before_anything_runs(tmp_path, monkeypatch, runner):
    monkeypatch.setitem(sys.modules, f"prefect_{runner}", None)  # as Python has what cannot be imported
    params = load_params(ROOT, "tiny", {"launch.runner": runner})
    with pytest.raises(
        ParamsError, match=rf"launch\.runner: {runner} needs prefect-{runner}: pip install 'rrlhf\[{runner}\]'"
    ):
        check_sources(Project(tmp_path, "tiny", params))
