"""`rrlhf evaluate-reward` on tiny artifacts, made by the stages and put in the store as the flow does it."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from rrlhf.cli import app
from rrlhf.data.tables import preferences, write_tables
from rrlhf.files import clear
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker

PROFILE = ("--profile", "tiny")


WORDS = ["the", "old", "bridge", "loved", "by", "many", "was", "rebuilt", "last", "year", "near", "town"]


def row(number):
    text = [" ".join(WORDS[(number * 5 + i * i) % 12] for i in range(1 + (number + more) % 5)) for more in (0, 2)]
    prompt = [{"role": "user", "content": f"Say {number // 2}"}]
    return {"prompt": prompt, "chosen": f"{text[0]} {number}", "rejected": text[1], "flipped": False}


def prepared_by_hand(project, document):
    """Put a data set there: no model has to write it."""
    staged = clear(project.store.staging("prepare", "by-hand"))
    for name, rows in {"preferences": range(40), "heldout": range(40, 60)}.items():
        write_tables(staged, ((name, each) for each in [row(n) for n in rows]))
    answers = [{"prompt": row(n)["prompt"], "response": row(n)["chosen"]} for n in range(8)]
    write_tables(staged, (("sft", each) for each in answers))
    (staged / "history.jsonl").write_text("")
    return project.store.publish("data", document, staged, seconds=1.0, profile="tiny").dataset


@pytest.fixture(scope="module")
def made(shared_project, database):
    """The project folder, and the tiny profile's artifacts up to the ensemble, registered."""
    shutil.copy(database, shared_project)
    params = load_params(shared_project, "tiny")
    project = Project(shared_project, "tiny", params)
    node, *models = project.nodes
    dataset = prepared_by_hand(project, project.document(node, {}))
    folders, digests, artifacts = {"data": dataset.path}, {"data": dataset.digest}, {}
    tracker = Tracker(shared_project, params.tracking.experiment)
    for node in models[:3]:
        document = project.document(node, digests)
        staged = clear(project.store.staging(node.stage, key_digest(document)))
        inputs = {argument: folders[name] for argument, name in node.inputs.items()}
        execute(document, inputs=inputs, out=staged, launch=params.launch)
        keys = {argument: artifacts[name].key for argument, name in node.inputs.items() if name != "data"}
        artifact = project.store.publish(node.name, document, staged, seconds=1.0, input_keys=keys, profile="tiny")
        tracker.register(artifact, dataset if node.name != "ensemble" else None, profile="tiny")
        folders[node.name], digests[node.name], artifacts[node.name] = artifact.path, artifact.digest, artifact
    return shared_project, artifacts, dataset


@pytest.fixture
def rrlhf(made, monkeypatch):
    monkeypatch.chdir(made[0])

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, ["evaluate-reward", *arguments])
        assert done.exit_code == code, done.output
        return done

    return run


@pytest.fixture
def file(made, tmp_path):
    """The held-out pairs as a file in the format of RewardBench; those that differ in what the model reads of them."""
    path, read = tmp_path / "bench.jsonl", slice(load_params(made[0], "tiny").model.response_tokens)  # a letter a token
    pairs = [pair for pair in preferences(made[2].path, "heldout") if pair.chosen[read] != pair.rejected[read]]
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "subset": "even" if n % 2 else "odd"}
        for n, pair in enumerate(pairs)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_the_profile_s_ensemble_is_judged_as_its_stage_judged_it(rrlhf, made):
    found = strict(rrlhf(*PROFILE, "--json").stdout)
    accuracy, metrics = found["answer"]["judgement"]["accuracy"], made[1]["ensemble"].metrics
    assert found["digest"] == made[1]["ensemble"].digest
    assert accuracy["worst"]["mean"] == pytest.approx(metrics["heldout_accuracy_worst"])
    assert found["answer"]["judgement"]["calibration"]["ece"] == pytest.approx(metrics["heldout_ece"], abs=1e-6)


@pytest.mark.parametrize("name", ["rrlhf-tiny-ensemble@latest", "rrlhf-tiny-ensemble/1", "digest", "folder"])
def test_a_model_is_named_by_version_digest_or_folder(rrlhf, made, name):
    ensemble = made[1]["ensemble"]
    given = {"digest": ensemble.digest[:10], "folder": str(ensemble.path)}.get(name, name)
    assert strict(rrlhf(given, *PROFILE, "--json").stdout)["digest"] == ensemble.digest


def test_texts_of_a_file_score_like_the_stored_features(rrlhf, made, file):
    found = strict(rrlhf(*PROFILE, "--data", str(file), "--format", "rewardbench", "--json").stdout)["answer"]
    stored = strict(rrlhf(*PROFILE, "--json").stdout)["answer"]["judgement"]
    assert found["judgement"]["pairs"] == stored["pairs"]
    assert found["judgement"]["accuracy"]["mean"]["mean"] == pytest.approx(stored["accuracy"]["mean"]["mean"])
    assert found["judgement"]["calibration"]["nll"] == pytest.approx(stored["calibration"]["nll"], abs=1e-5)
    assert set(found["subsets"]["subsets"]) == {"even", "odd"}


def test_a_question_with_several_responses_is_one_question_of_its_subset(rrlhf, made, file, tmp_path):
    """RewardBench 2: lists of one response each give the numbers of the same rows without lists."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    listed = tmp_path / "bench-2"
    listed.mkdir()
    lists = [row | {"chosen": [row["chosen"]], "rejected": [row["rejected"]]} for row in rows]
    (listed / "a.jsonl").write_text("\n".join(map(json.dumps, lists[:9])))
    (listed / "b.jsonl").write_text("\n".join(map(json.dumps, lists[9:])))
    options = (*PROFILE, "--format", "rewardbench", "--json", "--data")
    one, other = (strict(rrlhf(*options, str(data)).stdout)["answer"] for data in (file, listed))
    assert one == other
    (listed / "b.jsonl").write_text(json.dumps(lists[0] | {"rejected": ["a b", "c d", "e f"], "subset": "three"}))
    found = strict(rrlhf(*options, str(listed / "b.jsonl")).stdout)["answer"]
    assert (found["judgement"]["pairs"], found["questions"], found["subsets"]["subsets"]["three"]["n"]) == (3, 1, 1)


def test_perturbed_texts_give_a_table_and_a_page(rrlhf, made, tmp_path):
    said = rrlhf(*PROFILE, "--perturb", "1", "--limit", "4", "--out", str(tmp_path / "out")).stdout
    assert "neutral sentence" in said
    assert "coverage of 90 %" in said
    page = next((tmp_path / "out").glob("*.html")).read_text()
    assert "With perturbed texts" in page
    assert "Chart: Reliability of ensemble" in page
    assert not any(mark in page for mark in ("<script", "http://", "https://"))
    written = strict(next((tmp_path / "out").glob("*.json")).read_text())
    assert len(written["answer"]["robustness"]) == 8
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".html", ".json"}


def test_the_single_head_is_judged_too(rrlhf, made):
    found = strict(rrlhf("rrlhf-tiny-reward@latest", *PROFILE, "--json").stdout)["answer"]["judgement"]
    assert list(found["accuracy"]) == ["single head"]
    assert found["accuracy"]["single head"]["mean"] == pytest.approx(made[1]["reward"].metrics["heldout_accuracy"])


def test_mistakes_are_told_with_a_way_out(rrlhf, made, tmp_path, file):
    assert "close: rrlhf-tiny-ensemble@latest" in rrlhf("rrlhf-ensembel@latest", *PROFILE, code=2).output
    assert "name a model of reward or given or ensemble" in rrlhf("rrlhf-tiny-sft@latest", *PROFILE, code=2).output
    assert "`rrlhf run` comes first" in rrlhf(code=1).output
    assert "no artifact.json" in rrlhf(str(tmp_path), *PROFILE, code=2).output
    (tmp_path / "notes.txt").touch()
    for name, way_out in (("missing.jsonl", "no such file"), ("notes.txt", "name files that end with .jsonl")):
        assert way_out in rrlhf(*PROFILE, "--data", str(tmp_path / name), code=2).output
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "there is no row" in rrlhf(*PROFILE, "--data", str(empty), code=1).output
    assert (
        "no column 'score_chosen'" in rrlhf(*PROFILE, "--data", str(file), "--format", "ultrafeedback", code=1).output
    )
    assert (
        "did you mean ultrafeedback" in rrlhf(*PROFILE, "--data", str(file), "--format", "ultrafedback", code=2).output
    )
    said = rrlhf("rrlhf-tiny-ensemble@latest", "--perturb", "1", code=2).output
    assert "name its --profile, or a file with --data" in said


def test_a_changed_file_is_refused_and_a_lost_one_comes_back(rrlhf, made):
    ensemble = made[1]["ensemble"]
    heads = ensemble.path / "heads.safetensors"
    kept = heads.read_bytes()
    heads.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "expected sha256" in rrlhf(ensemble.digest[:8], *PROFILE, code=3).output
    shutil.rmtree(ensemble.path)
    assert strict(rrlhf("rrlhf-tiny-ensemble@latest", *PROFILE, "--json").stdout)["digest"] == ensemble.digest
    assert Store(made[0]).find("ensemble", ensemble.key) is not None
    assert heads.read_bytes() == kept
