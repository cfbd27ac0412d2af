"""Where data comes from: kinds of files, shards, the hub, and what a plan says of a source before anything runs."""

import csv
import gzip
import io
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preferences import load_preferences
from typer.testing import CliRunner

from rrlhf.cli import app
from rrlhf.config import Prepare
from rrlhf.data.files import hub_rows, is_hub_id, source_digest, source_files
from rrlhf.data.rows import FORMATS
from rrlhf.located import ParamsError
from rrlhf.memo import Memo
from rrlhf.models.sources import pinned_commit
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"prompt": f"Question {i}?", "chosen": f"yes\n{i}", "rejected": 'no, "never"', "answer": i} for i in range(1500)
]


def load(source, **changes):
    options = {"format": "rows", "max_rejected": 0.5, "limit": None} | changes
    return load_preferences(str(source), **options)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def cells(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(rows, new):
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.jsonl.zst": lambda rows: zstd(lines(rows[:700])) + zstd(lines(rows[700:])),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "a.json.zst": lambda rows: zstd(json.dumps(rows).encode()),
    "a.csv": cells,
    "a.CSV.gz": lambda rows: gzip.compress(cells(rows)),
    "a.csv.zst": lambda rows: zstd(cells(rows)),
    "a.tsv": lambda rows: cells(rows, "\t"),
    "a.tsv.gz": lambda rows: gzip.compress(cells(rows, "\t")),
    "a.parquet": parquet,
    "a.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "b.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name](ROWS))
    loaded = load(tmp_path / name, max_rejected=0)
    assert [pair.chosen for pair in loaded.preferences] == [row["chosen"] for row in ROWS]
    assert [int(columns["answer"]) for columns in loaded.columns] == [row["answer"] for row in ROWS]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in {"a.jsonl", "a.csv", "a.tsv", "a.json"}])
def test_a_file_that_ends_early_is_refused_by_name(tmp_path, name):
    content = KINDS[name](ROWS)
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="fetch") as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_scores_decide_in_csv_too(tmp_path):
    rows = [
        row | {"score_chosen": 2.5, "score_rejected": score} for row, score in zip(ROWS, [1, 2.5, 3, ""], strict=False)
    ]
    (tmp_path / "a.csv").write_bytes(cells(rows))
    found = [(row.line, row.rule) for row in load(tmp_path / "a.csv", max_rejected=1.0).rejected]
    assert found == [(4, "score_tie"), (6, "score_contradicts_label"), (8, "wrong_type")]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        (folder / f"train-{n}.jsonl").write_bytes(lines(ROWS[2 * n : 2 * n + 2]))
    (folder / "README.md").write_text("About these rows.")
    (folder / "dataset_info.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("{")
    return folder


def test_a_folder_of_shards_is_one_source_in_the_order_of_names(shards):
    assert [pair.prompt[0]["content"] for pair in load(shards).preferences] == [f"Question {i}?" for i in range(6)]
    assert load(shards) == load(f"{shards}/*.jsonl") == load(f"{shards.parent}/**/train-?.jsonl")
    assert [pair.chosen for pair in load(f"{shards}/train-[02].jsonl").preferences] == [
        "yes\n0",
        "yes\n1",
        "yes\n4",
        "yes\n5",
    ]


def test_a_bad_row_is_told_with_its_shard_and_its_line_there(shards):
    (shards / "train-1.jsonl").write_bytes(lines(ROWS[:1]) + b"{\n" + lines(ROWS[2:3] * 2))
    found = load(shards).rejected
    assert [(Path(row.file).name, row.line, row.rule) for row in found] == [
        ("train-1.jsonl", 1, "duplicate"),
        ("train-1.jsonl", 2, "bad_json"),
        ("train-1.jsonl", 4, "duplicate"),
    ]
    assert found[0].detail == f"same as {shards}/train-0.jsonl:1"
    assert found[2].detail == "same as line 3"


def test_files_that_do_not_belong_together_are_told_with_a_way_out(shards):
    def refusal(source=shards):
        with pytest.raises(ValueError, match=r".") as error:
            source_files(str(source))
        return str(error.value)

    (shards / "test.jsonl").write_bytes(lines(ROWS[:1]))
    assert f"more than one split (test, train); name those of one by a pattern, such as {shards}/test*" in refusal()
    (shards / "test.jsonl").rename(shards / "latest.jsonl")  # no split's name
    assert len(source_files(str(shards))) == 4
    (shards / "more.csv").write_text("")
    assert ".csv and .jsonl files; name those of one kind by a pattern that ends with *.csv" in refusal()
    assert "README.md: name files that end with .jsonl" in refusal(f"{shards}/*")
    assert "no file matches" in refusal(f"{shards}/*.parquet")
    assert "name one of the folders in it: shards" in refusal(shards.parent)


def test_only_ids_of_the_hub_are_taken_for_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-v0.1")  # a dot is no ending
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").mkdir()
    for path in ("data/pairs.jsonl", "data/pairs.csv.gz", "pairs", "./pairs", "a/b/c", "owner/here", "data/*.x"):
        assert not is_hub_id(path), path


def settings(**changes):
    return Prepare.model_validate(load_params(ROOT).prepare.model_dump() | {"format": "rows"} | changes)


def digest(tmp_path, source, **changes):
    return source_digest(settings(source=str(source), **changes), Memo(tmp_path / "memo.json"))


def test_the_digest_is_of_the_shards_that_are_read_wherever_they_lie(shards, tmp_path):
    first = digest(tmp_path, shards)
    (shards / "README.md").write_text("Other words.")
    moved = shards.rename(tmp_path / "elsewhere")
    assert digest(tmp_path, moved) == first
    (moved / "train-1.jsonl").write_bytes(lines(ROWS[9:10]))
    assert digest(tmp_path, moved) != first


def test_what_belongs_to_the_hub_means_nothing_for_a_file(shards, tmp_path):
    with pytest.raises(ParamsError) as error:
        digest(tmp_path, shards, revision=COMMIT, config="en", split="train")
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "prepare.revision",
        "prepare.config",
        "prepare.split",
    ]
    with pytest.raises(ParamsError, match=r"prepare\.split: it belongs to a hub data set; written tasks have none"):
        load_params(ROOT, "tiny", {"prepare.split": "train"})


@contextmanager
def hub(answer):
    """A server that answers one path as the hub does, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            content = json.dumps(body).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answered(path):
    if path == "/api/datasets/owner/name/revision/main":
        return 200, {}, {"id": "owner/name", "sha": COMMIT}
    if path.startswith("/api/datasets/owner/name/"):
        return 404, {"X-Error-Code": "RevisionNotFound"}, {}
    return 404, {"X-Error-Code": "RepoNotFound"}, {}


def refusal(repo, revision, kind="dataset"):
    with pytest.raises(ParamsError) as error:
        pinned_commit(repo, revision, setting="prepare.revision", kind=kind)
    return str(error.value)


def test_a_revision_is_a_commit_and_of_a_branch_the_commit_is_told(monkeypatch):
    assert pinned_commit("owner/name", COMMIT, setting="prepare.revision", kind="dataset") == COMMIT
    with hub(answered) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        assert f"'main' is no commit of owner/name, 40 hex digits: main is now {COMMIT}: write that" in refusal(
            "owner/name", "main"
        )
        assert "the hub has no such revision of it" in refusal("owner/name", COMMIT[:7])
        assert "the hub has no such dataset" in refusal("owner/nowhere", "main")
        assert "the hub has no such model" in refusal("owner/name", "v1.0", kind="model")


def test_without_the_hub_it_is_told_where_commits_stand(monkeypatch):
    with hub(answered) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    told = refusal("owner/away", "main")  # nobody listens there any more
    assert "the hub was asked in vain" in told
    assert "see https://huggingface.co/datasets/owner/away/commits/main" in told
    assert "prepare.revision is null, and 'owner/away' is no file or folder here" in refusal("owner/away", None)


def test_a_hub_data_set_is_read_by_commit_config_and_split(monkeypatch):
    import datasets

    calls = []

    def load_dataset(source, **options):
        calls.append((source, options))
        return datasets.Dataset.from_list([ROWS[0], ROWS[0], ROWS[1] | {"chosen": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("owner/name", revision=COMMIT, config="en", split="test", max_rejected=0.7)
    assert load("owner/name", revision=COMMIT, max_rejected=0.7) == loaded
    assert calls == [
        ("owner/name", {"name": "en", "revision": COMMIT, "split": "test"}),
        ("owner/name", {"name": None, "revision": COMMIT, "split": "train"}),
    ]
    assert [row[:3] for row in loaded.rejected] == [
        (f"owner/name@{COMMIT}", 2, "duplicate"),
        (f"owner/name@{COMMIT}", 3, "wrong_type"),
    ]
    assert loaded.columns == [{"answer": 0}]


def test_the_hub_s_library_finds_configs_and_splits_and_says_when_there_is_none(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    for number, name in enumerate(["en/train", "en/test", "de/train"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_bytes(lines(ROWS[number : number + 1]))
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train.jsonl"}]}
        for name in ("de", "en")
    ]
    configs[1]["data_files"].append({"split": "test", "path": "en/test.jsonl"})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    def first(config, split):
        rows = hub_rows(str(folder), FORMATS["rows"], revision=COMMIT, config=config, split=split)
        return [row["answer"] for _, _, row in rows]

    assert (first("en", None), first("en", "test"), first("de", "train")) == ([0], [1], [2])
    with pytest.raises(ValueError, match=r"cannot be had .*check prepare\.source, revision, config and split"):
        first(None, None)
    with pytest.raises(ValueError, match=r"cannot be had .*'test' here"):
        first("de", "test")


@pytest.fixture
def rrlhf(project, monkeypatch):
    """The command in a project's folder; returns what it said."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments, code=2, **changes):
        set_ = [f"--set=prepare.{name}={json.dumps(value)}" for name, value in ({"format": "rows"} | changes).items()]
        done = CliRunner().invoke(app, [*arguments, "--profile", "tiny", *set_])
        assert done.exit_code == code, done.output
        return done.output

    yield run
    sys.modules.pop("rules_of_columns", None)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "there is no row; name another file"),
        (b"\n\n", "there is no row; name another file"),
        (lines([{"prompt": "a", "choosen": "b", "rejected": "c"}]), "no column 'chosen' (did you mean 'choosen'?)"),
        (lines([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3), "3 chosen_equals_rejected: delete the row"),
        (lines([row | {"score_chosen": 1, "score_rejected": 2} for row in ROWS]), "none of 1500 rows is good"),
    ],
)
def test_a_source_without_a_good_row_is_told_before_anything_runs(rrlhf, project, command, content, told):
    (project / "rows.jsonl").write_bytes(content)
    said = rrlhf(command, source="rows.jsonl")
    assert "prepare.source rows.jsonl: " in said
    assert told in said
    assert not (project / "data").exists()
    assert not (project / "mlflow.db").exists()


def test_all_mistakes_of_a_source_a_base_and_a_function_are_told_at_once(rrlhf, project):
    (project / "rows.jsonl").touch()
    wrong = ("--set", "model.base=nowhere.gguf", "--set", "arms.robust.functions={nowhere:f: 1}")
    for command in ("plan", "run"):
        said = rrlhf(command, *wrong, source="rows.jsonl")
        assert [line.split()[0] for line in said.splitlines()] == ["model.base", "reward", "prepare.source"]


def test_a_plan_reads_no_further_than_the_first_good_row(rrlhf, project, monkeypatch):
    (project / "rows.jsonl").write_bytes(b"{\n" + lines(ROWS[:1]) + b"{\n" * 10_000)
    assert "run       never made here" in rrlhf("plan", source="rows.jsonl", code=0)


def test_a_function_s_column_is_asked_of_the_source_before_anything_runs(rrlhf, project):
    (project / "rules_of_columns.py").write_text(
        "def exact(completions, answer): ...\n"
        "def close(completions, answr, **_): ...\n"
        "def any(completions, other=1): ...\n"
    )
    (project / "late.jsonl").write_bytes(lines([*({**row, "answer": None} for row in ROWS), ROWS[0] | {"prompt": "?"}]))
    (project / "rows.csv").write_bytes(cells(ROWS))

    def asked(name):
        return ("--set", f"arms.robust.functions={{rules_of_columns:{name}: 1}}")

    for source in ("late.jsonl", "rows.csv"):
        for name in ("exact", "any"):
            rrlhf("plan", *asked(name), source=source, code=0)
        said = rrlhf("plan", *asked("close"), source=source)
        assert "rules_of_columns:close: it needs answr; " in said
        assert "the data has the columns answer" in said
    said = rrlhf("plan", *asked("exact"), source="written", format="written")
    assert "the data has no columns beside those of its format" in said


def made_by_hand(project, changes, summary):
    """Put a data set there that has no more than a summary."""
    found = Project(project, "tiny", load_params(project, "tiny", changes))
    staged = found.store.staging("prepare", "by-hand")
    staged.mkdir(parents=True)
    (staged / "summary.json").write_text(json.dumps(summary))
    (staged / "history.jsonl").write_text("")
    found.store.publish("data", found.document(found.nodes[0], {}), staged, seconds=1.0)


def test_of_a_hub_data_set_the_columns_are_known_once_it_is_made(rrlhf, project):
    (project / "rules_of_columns.py").write_text("def close(completions, answr): ...\n")
    asked = ("--set", "arms.robust.functions={rules_of_columns:close: 1}")
    assert "run       never made here" in rrlhf("plan", *asked, source="owner/name", revision=COMMIT, code=0)
    changes = {"prepare.format": "rows", "prepare.source": "owner/name", "prepare.revision": COMMIT}
    made_by_hand(project, changes, {"rows": 1, "columns": ["answer", "id"]})
    said = rrlhf("plan", *asked, source="owner/name", revision=COMMIT)
    assert "it needs answr; " in said
    assert "the data has the columns answer, id" in said
