"""`rrlhf push` against a server on loopback that speaks what the hub's library asks of the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import ModelCard, constants

from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_digest, key_document
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.store import Store

TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """Answers like the hub where it takes all files as they are, and keeps what it got."""

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        where, repositories = self.path.partition("/api/models/")[2], self.server.repositories
        here = f"http://{self.headers['Host']}"
        if self.path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            repositories[name] = {"private": asked["visibility"] == "private", "files": {}}
            return self.answer({"url": f"{here}/{name}", "name": name})
        if where.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(sent)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if where.endswith("/commit/main"):
            kept = repositories[where.removesuffix("/commit/main")]
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "header":
                    kept["message"] = line["value"]["summary"]
                else:
                    kept["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{here}/team/model/commit/1", "commitOid": "1", "success": True})
        return self.answer({"warnings": [], "errors": []})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)  # what HF_ENDPOINT becomes in a process of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server.repositories
        server.shutdown()


@pytest.fixture
def made(project, monkeypatch):
    """A model in a project's store, and the project's folder as the present one."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", "")  # restored afterwards
    [node] = [node for node in nodes(load_params(project, "tiny")) if node.stage == "sft"]
    document, store = key_document(node, {"data": "d" * 64}), Store(project)
    staged = store.staging("sft", key_digest(document))
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"weights")
    (staged / "samples.json").write_text('["a prompt of the data"]')
    (staged / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return store.publish("sft", document, staged, seconds=1.0)


def test_a_model_arrives_with_its_card_and_every_byte_in_a_private_repository(made, hub, typed):
    code, told, said = typed("push", made.key[:12], "team/model")
    assert code == 0, said
    assert told.endswith("/team/model/commit/1\n")
    files = {path.name: path.read_bytes() for path in made.path.iterdir() if path.name != "samples.json"}
    assert hub == {"team/model": {"private": True, "files": files, "message": f"SFT model ({made.digest[:12]})"}}
    assert "rrlhf-sft" in ModelCard(files["README.md"].decode(), ignore_metadata_errors=False).data.tags


def test_a_dry_run_shows_files_and_sizes_and_sends_nothing(made, hub, typed):
    code, told, _ = typed("push", made.key[:12], "team/model", "--dry-run")
    assert code == 0
    assert "7  model.safetensors\n" in told
    assert "samples.json" not in told
    total = sum(path.stat().st_size for path in made.path.iterdir() if path.name != "samples.json")
    assert f"{total:,}  bytes would go to http://127.0.0.1" in told
    assert hub == {}


def test_a_name_that_the_hub_has_not_is_told(made, hub, typed):
    code, _, said = typed("push", made.key[:12], "a/b/c")
    assert (code, "'a/b/c'" in said) == (2, True)


def test_a_changed_byte_or_another_persons_token_sends_nothing(made, hub, typed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    code, _, said = typed("push", made.key[:12], "team/model", "--public")
    assert code == 1
    assert "asked by HF_TOKEN or `hf auth login`, took nothing: Client error '401" in said
    assert "hf_of_another" not in said
    (made.path / "model.safetensors").write_bytes(b"Weights")
    code, _, said = typed("push", made.key[:12], "team/model")
    assert code == 3
    assert "model.safetensors: expected sha256" in said
    assert hub == {}
