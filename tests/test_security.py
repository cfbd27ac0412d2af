"""Nothing that is read back runs code: a payload is planted in each kind of file, and a mark tells if it ever ran."""

import ast
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from finished import at_work
from preferences import load_preferences

from rrlhf.files import CHECKPOINT
from rrlhf.located import ParamsError, UsageError
from rrlhf.memo import sha256
from rrlhf.models.adapters import adapted, load_adapters, save_adapters
from rrlhf.models.load import ModelError, load_base, save_model
from rrlhf.models.processes import accelerator
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params, parse_override
from rrlhf.pipeline.store import Store
from rrlhf.policy.checkpoint import Checkpoints, PlantedError, State
from rrlhf.tools.sweeps.grid import load_experiment

ROOT = Path(__file__).parents[1]


class Payload:
    """What a pickle runs."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that a payload makes; whoever is asked whether to run something gets a yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    path = tmp_path / "fired"
    yield path
    assert not path.exists()


@pytest.fixture
def folder(model, tmp_path):
    save_model(load_base(model), tmp_path / "base")
    return tmp_path / "base"


def loaded(model, place):
    return load_base(model.model_copy(update={"base": str(place)}))


def configured(folder, file, **changed):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changed))


CODE = dict.fromkeys(["AutoConfig", "AutoModelForCausalLM"], "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2}
CONFIGURED = [
    ("config.json", {"model_type": "evil", "auto_map": CODE}, "rrlhf runs none"),
    ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": CODE}, "rrlhf runs none"),
    ("config.json", {"attn_implementation": "evil/kernel"}, "asks for code of the hub, evil/kernel"),
]


def test_the_code_that_comes_with_a_model_is_never_run_nor_asked_about(model, folder, mark):
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: ...\n")
    sound = {file: (folder / file).read_text() for file, *_ in CONFIGURED}
    for file, changed, told in CONFIGURED:
        configured(folder, file, **changed)
        with pytest.raises(ModelError, match=told):
            loaded(model, folder)
        (folder / file).write_text(sound[file])
    configured(folder, "config.json", auto_map=CODE)
    assert loaded(model, folder).layers == 3  # of a make that transformers has, by its own code


def test_weights_that_are_a_pickle_are_refused_unread_and_those_beside_safetensors_left_alone(model, folder, mark):
    torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")
    assert loaded(model, folder).layers == 3
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights are a pickle \(\*\.bin\), which can hold code"):
        loaded(model, folder)


def test_weights_are_read_from_the_model_s_folder_alone(model, folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names files outside of the folder: \.\./outside\.safetensors"):
        loaded(model, folder)


HUGE = {"lm_head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
LYING = [
    struct.pack("<Q", 2**62) + b"{}",
    struct.pack("<Q", 129) + json.dumps(HUGE).encode().ljust(129),
    b"",
    b"\0" * 99,
]


@pytest.mark.parametrize("content", LYING)
def test_weights_that_lie_about_their_size_are_refused_by_name(model, folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=f"{folder}: SafetensorError"):
        loaded(model, folder)


@pytest.mark.parametrize(
    "content", [b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40), b"GGUF" + b"\0" * 99, b"\x80\x04", b""]
)
def test_a_gguf_file_that_lies_about_its_size_is_refused_by_name(model, tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf: "):
        loaded(model, tmp_path / "model.gguf")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% for ",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(model, folder, mark, template):
    (folder / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    with pytest.raises(ModelError, match=f"{folder}: "):
        loaded(model, folder)


def test_adapters_that_are_a_pickle_run_nothing(model, tmp_path, mark):
    save_adapters(adapted(load_base(model), range(1), rank=2), tmp_path)
    [stored] = (tmp_path / "adapters").rglob("adapter_model.safetensors")
    torch.save({"a": Payload(mark)}, stored.with_suffix(".bin"))
    assert load_adapters(load_base(model), tmp_path).adapters
    stored.unlink()
    with pytest.raises(pickle.UnpicklingError):
        load_adapters(load_base(model), tmp_path)


def test_a_checkpoint_that_was_planted_with_a_fitting_record_ends_the_run_with_3(model, tmp_path, mark):
    checkpoints = Checkpoints(tmp_path, accelerator(model), seed=1)
    checkpoints.save(1, State({"weights": torch.ones(2)}, {"step": 1}))
    assert checkpoints.newest().own == {"step": 1}
    saved = tmp_path / CHECKPOINT / "00000001"
    torch.save({"weights": Payload(mark)}, saved / "shared.pt")
    assert checkpoints.newest() is None  # as one that was changed
    record = json.loads((saved / "checkpoint.json").read_text())
    record["files"]["shared.pt"] = sha256(saved / "shared.pt")
    (saved / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(PlantedError, match="nothing of it was run") as error:
        checkpoints.newest()
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "record", ["[]", "{}", '{"files": 1, "made_for": 1}', "[" * 99999, '{"files": {}, "made_for": 3}']
)
def test_a_checkpoint_with_an_odd_record_is_not_used(model, tmp_path, record):
    checkpoints = Checkpoints(tmp_path, accelerator(model))
    checkpoints.save(1, State({}, {}))
    (tmp_path / CHECKPOINT / "00000001" / "checkpoint.json").write_text(record)
    assert checkpoints.newest() is None


def published(store):
    document = {"stage": "sft", "params": {}, "inputs": {}, "code": {}, "numerics": {}}
    staged = store.staging("sft", key_digest(document))
    staged.mkdir(parents=True)
    (staged / "history.jsonl").write_text("")
    return store.publish("sft", document, staged, seconds=1.0)


@pytest.mark.parametrize("name", ["adapters", "model.safetensors.index.json"])
def test_a_link_that_was_planted_in_a_result_is_refused_wherever_it_leads(tmp_path, name):
    store = Store(tmp_path / "project")
    artifact = published(store)
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        (artifact.path / name).symlink_to(target)
        with pytest.raises(TamperedError, match=f"{name}: expected no such file") as error:
            store.checked("sft", artifact.key)
        assert error.value.exit_code == 3
        (artifact.path / name).unlink()


NOTES = [b"[]", b"{}", b'"x"', b"\x80\x04.", b"[" * 99999, b'{"of": 1}', b"null"]


def test_whatever_stands_in_a_note_is_read_as_data_and_does_no_harm(project, typed, monkeypatch, mark):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", "")
    sound = typed("plan", "--profile", "tiny", "--json")
    (project / ".rrlhf" / "last").mkdir(exist_ok=True)
    names = {path.name for path in (project / ".rrlhf").glob("*.json")} | {"digests.json", "registered.json"}
    for content in (*NOTES, pickle.dumps(Payload(mark))):
        for name in names:
            (project / ".rrlhf" / name).write_bytes(content)
        assert typed("plan", "--profile", "tiny", "--json") == sound


TAGGED = ["!!python/object/apply:pathlib.Path.touch [MARK]", "!!python/name:os.system", "!!python/module:os"]


@pytest.mark.parametrize("value", TAGGED)
def test_settings_in_yaml_make_no_objects(project, mark, value):
    value = value.replace("MARK", f"!!python/object/apply:pathlib.Path [{mark}]")
    (project / "params.yaml").write_text(f"seed: {value}\n" + (project / "params.yaml").read_text())
    with pytest.raises(ParamsError):
        load_params(project, "default")
    with pytest.raises(ParamsError):
        load_params(ROOT, "tiny", dict([parse_override(f"seed={value}")]))
    (project / "experiments").mkdir()
    (project / "experiments" / "planted.yaml").write_text(f"vary: {value}\n")
    with pytest.raises(UsageError):
        load_experiment(project, "planted")


def test_a_table_of_the_data_brings_no_type_that_runs(tmp_path, mark):
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    kind[b"ARROW:extension:metadata"] = pickle.dumps(Payload(mark))
    fields = [pa.field(name, pa.string(), metadata=kind) for name in ("prompt", "chosen", "rejected")]
    table = pa.table([["Hi?"], ["Yes."], ["No."]], schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "rows.parquet")
    loaded = load_preferences(str(tmp_path / "rows.parquet"), format="rows", max_rejected=0.0, limit=None)
    assert loaded.preferences[0].chosen == "Yes."


IMPORTING = """
import sys
from pathlib import Path
from rrlhf.environment import set_environment
set_environment(Path(sys.argv[1]))
from prefect import flow
"""


def test_prefect_sets_its_logs_up_by_its_own_file(tmp_path):
    with at_work(tmp_path):
        file = Path(os.environ["PREFECT_LOGGING_SETTINGS_PATH"])
    assert file.parts[-4:] == ("site-packages", "prefect", "logging", "logging.yml")
    assert file.is_file()


@pytest.mark.slow  # the test above says it in short
def test_what_stands_in_prefects_home_is_not_run(tmp_path, mark):
    home = tmp_path / ".rrlhf" / "prefect"
    home.mkdir(parents=True)
    planted = {"()": "subprocess.Popen", "args": ["touch", str(mark)]}
    logging = {"version": 1, "handlers": {"planted": planted}, "loggers": {"prefect": {"handlers": ["planted"]}}}
    (home / "logging.yml").write_text(yaml.safe_dump(logging))
    (home / "profiles.toml").write_text(
        f'active = "p"\n[profiles.p]\nPREFECT_LOGGING_SETTINGS_PATH = "{home / "logging.yml"}"\n'
    )
    done = subprocess.run([sys.executable, "-c", IMPORTING, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORBIDDEN = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "joblib.load",
}
FORBIDDEN |= {
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "shelve.open",
    "tarfile.open",
    "zipfile.ZipFile",
    "os.system",
}


GUARDS = {"torch.load": "weights_only=True", ".from_pretrained": "trust_remote_code"}


def test_no_reader_that_could_run_code_is_called_without_its_guard():
    guarded = set()
    for path in [*ROOT.glob("rrlhf/**/*.py"), *ROOT.glob("flows/**/*.py")]:
        text = path.read_text()
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func): ast.unparse(call) for call in calls}
        assert not names.keys() & FORBIDDEN, path
        for name, call in names.items():
            for reader in GUARDS:
                if name.endswith(reader) and name != "PeftConfig.from_pretrained":
                    guarded.add(reader)
                    assert GUARDS[reader] in call or ("**options" in call and GUARDS[reader] in text), (path, call)
    assert guarded == {*GUARDS}
