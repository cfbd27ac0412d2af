"""Signatures: who made an artifact is told by a key, and everything that is read is held against it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from rrlhf.config import Signatures
from rrlhf.located import ParamsError
from rrlhf.memo import sha256
from rrlhf.pipeline.artifacts import MANIFEST, SIGNATURE, CopyError, TamperedError, content_digest, sealed, unsealed
from rrlhf.pipeline.check import check_sources
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.produce import produce
from rrlhf.pipeline.signatures import Notary, notary_of
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.tools.signing import sign, written_pair

model_signing = pytest.importorskip("model_signing", reason="pip install 'rrlhf[sign]'")

ROOT = Path(__file__).parents[2]


def settings(private=None, public=None):
    given = (str(path) if path else None for path in (private, public))
    return Signatures(**dict(zip(("private_key", "public_key"), given, strict=True)))


def store_of(root, private=None, public=None):
    return Store(root, notary_of(root, settings(private, public)))


def document(name="sft", seed=1):
    return {"stage": name, "params": {"seed": seed}, "inputs": {}, "code": {}, "numerics": {}}


def publish(store, name="sft", content=b"weights", seed=1):
    staged = store.staging(name, key_digest(document(name, seed)))
    (staged / "deep").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "deep" / "notes.json").write_text("{}")
    (staged / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return store.publish(name, document(name, seed), staged, seconds=1.0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return written_pair(tmp_path_factory.mktemp("keys") / "key")


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory):
    return written_pair(tmp_path_factory.mktemp("keys") / "other")


@pytest.fixture
def store(tmp_path, keys):
    return store_of(tmp_path, *keys)


@pytest.fixture
def artifact(store):
    return publish(store)


def refused(store, artifact):
    """What the next use says; with a memory as another machine has it, and with ours."""
    shutil.rmtree(store.root.parent / ".rrlhf")
    with pytest.raises(TamperedError) as error:
        store_of(store.root.parent, *store.notary._paths.values()).checked(artifact.stage, artifact.key)
    with pytest.raises(TamperedError):
        store.checked(artifact.stage, artifact.key)
    return str(error.value)


def test_what_is_published_is_signed_and_what_is_read_is_verified(store, artifact):
    assert store.checked("sft", artifact.key) == artifact
    assert SIGNATURE not in artifact.manifest["files"]
    assert not list(store.root.glob(".staging/*"))


def test_a_signature_changes_no_digest(artifact, tmp_path):
    assert publish(Store(tmp_path / "plain")).digest == artifact.digest


def test_a_changed_byte_of_what_is_signed_or_of_the_signature_is_found(store, artifact):
    path = artifact.path / SIGNATURE
    sound, unseen = path.read_bytes(), []
    start, end = sound.index(b'"payload"') + 12, len(sound) - 4
    for position in range(start, end, 97):
        changed = b"A" if sound[position : position + 1] != b"A" else b"B"
        path.write_bytes(sound[:position] + changed + sound[position + 1 :])
        unseen += [] if store.fault(artifact) else [position]
    assert unseen == []


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 100_000, '{"verificationMaterial": 1}'])
def test_what_is_no_signature_is_refused(store, artifact, text):
    (artifact.path / SIGNATURE).write_text(text)
    assert SIGNATURE in store.fault(artifact)


def forge(artifact):
    """Change a file as somebody would who has read the code: digests and seal fit again."""
    (artifact.path / "model.bin").write_bytes(b"hacked!")
    manifest = unsealed((artifact.path / MANIFEST).read_bytes())
    manifest["files"]["model.bin"] = sha256(artifact.path / "model.bin")
    manifest["digest"] = content_digest(manifest["files"])
    (artifact.path / MANIFEST).write_text(sealed(manifest))


def test_a_forgery_that_is_sealed_again_is_found_by_the_signature_alone(store, artifact, tmp_path):
    forge(artifact)
    assert Store(tmp_path).checked("sft", artifact.key)  # without a key it is sound
    said = refused(store, artifact)
    assert "Signature mismatch" in said
    assert "artifact.json" in said
    assert "model.bin" in said


def test_a_signature_by_another_key_is_refused(store, artifact, tmp_path, other_keys):
    Notary(tmp_path, settings(other_keys[0])).sign(artifact.path)
    assert "Key mismatch" in refused(store, artifact)


def test_another_key_that_calls_itself_ours_is_refused(store, artifact, tmp_path, other_keys):
    path = artifact.path / SIGNATURE
    ours = json.loads(path.read_text())["verificationMaterial"]
    Notary(tmp_path, settings(other_keys[0])).sign(artifact.path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verificationMaterial": ours}, separators=(",", ":")))
    assert "this key did not make it" in refused(store, artifact)


def test_the_signature_of_another_artifact_is_refused(store, artifact):
    other = publish(store, content=b"others", seed=2)
    shutil.copy(other.path / SIGNATURE, artifact.path / SIGNATURE)
    assert "Signature mismatch" in refused(store, artifact)


def test_a_signature_that_leaves_a_file_out_is_refused(store, artifact, keys):
    listing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE, "model.bin"])
    (artifact.path / SIGNATURE).unlink()
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(listing)
    config.sign(artifact.path, artifact.path / SIGNATURE)
    assert "model.bin" in refused(store, artifact)


def test_an_artifact_without_a_signature_is_refused_and_told_how_to_get_one(store, artifact):
    (artifact.path / SIGNATURE).unlink()
    assert "`rrlhf sign`" in refused(store, artifact)


def test_a_known_signature_is_verified_again_only_by_a_deep_look(store, artifact, keys, tmp_path, monkeypatch):
    store.checked("sft", artifact.key)
    looks = []
    monkeypatch.setattr("rrlhf.pipeline.signatures.invalid", lambda *arguments: looks.append(1))
    again = store_of(tmp_path, *keys)
    again.checked("sft", artifact.key)
    assert not looks
    again.fault(artifact, deep=True)
    assert looks


def test_what_is_known_of_one_key_says_nothing_of_another(store, artifact, other_keys, tmp_path):
    store.checked("sft", artifact.key)
    with pytest.raises(TamperedError, match="Key mismatch"):
        store_of(tmp_path, None, other_keys[1]).checked("sft", artifact.key)


def test_a_downloaded_artifact_is_verified_before_it_is_adopted(store, artifact):
    for damage in (lambda folder: (folder / SIGNATURE).unlink(), lambda folder: None):
        downloaded = store.root / ".staging" / "restore"
        shutil.copytree(artifact.path, downloaded)
        damage(downloaded)
        if not (downloaded / SIGNATURE).exists():
            with pytest.raises(TamperedError, match="expected a signature"):
                store.adopt(artifact.key, downloaded)
            shutil.rmtree(downloaded)
    shutil.rmtree(artifact.path)
    assert store.adopt(artifact.key, downloaded).digest == artifact.digest


def test_the_official_command_accepts_what_we_sign(artifact, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(artifact.path)]
    command += ["--signature", str(artifact.path / SIGNATURE), "--public_key", str(keys[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (artifact.path / "model.bin").write_bytes(b"hacked!")
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    with pytest.raises(ValueError, match=r"model\.bin"):
        verifier.verify(artifact.path, artifact.path / SIGNATURE)


def test_we_accept_what_the_official_library_signs(store, artifact, keys):
    (artifact.path / SIGNATURE).unlink()
    listing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(listing)
    config.sign(artifact.path, artifact.path / SIGNATURE)
    assert store.checked("sft", artifact.key)


def write_pair(path, key, encryption=None):
    public = path.with_name(f"{path.name}.pub")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path, public


def mistakes(root, private=None, public=None):
    with pytest.raises(ParamsError) as error:
        notary_of(root, settings(private, public)).check()
    return str(error.value).splitlines()


def test_all_mistakes_in_keys_are_told_at_once(tmp_path, keys, other_keys):
    (tmp_path / "text").write_text("no key")
    lines = mistakes(tmp_path, "nowhere", "text")
    assert [line.partition(":")[0] for line in lines] == ["signatures.private_key", "signatures.public_key"]
    assert "No such file" in lines[0]
    assert "not a public key on P-256, P-384, P-521 in PEM form" in lines[1]
    assert "not a private key" in mistakes(tmp_path, keys[1])[0]
    assert "not the other half" in mistakes(tmp_path, keys[0], other_keys[1])[0]
    curve = write_pair(tmp_path / "curve", ec.generate_private_key(ec.SECP256K1()))
    assert all("P-256, P-384, P-521" in line for line in mistakes(tmp_path, *curve))
    other_kind = write_pair(tmp_path / "rsa", rsa.generate_private_key(65537, 1024))
    assert all("P-256, P-384, P-521" in line for line in mistakes(tmp_path, *other_kind))
    secret = write_pair(tmp_path / "secret", ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x"))
    assert "password" in mistakes(tmp_path, secret[0])[0]


def test_a_missing_library_is_told_with_the_way_to_it(tmp_path, keys, monkeypatch):
    monkeypatch.setattr("rrlhf.pipeline.signatures.find_spec", lambda name: None)
    assert mistakes(tmp_path, *keys) == [
        "signatures: the library that signs and verifies is not installed: pip install 'rrlhf[sign]'"
    ]


def test_a_path_may_begin_with_the_home_folder_or_be_relative_to_the_project(tmp_path, keys, monkeypatch):
    monkeypatch.setenv("HOME", str(keys[0].parent))
    shutil.copy(keys[1], tmp_path / "key.pub")
    notary_of(tmp_path, settings("~/key", "key.pub")).check()


def test_a_long_run_signs_though_its_key_file_vanished(tmp_path, keys):
    private = Path(shutil.copy(keys[0], tmp_path / "key"))
    notary = Notary(tmp_path, settings(private, keys[1]))
    notary.check()
    private.unlink()
    store = Store(tmp_path, notary)
    assert store.checked("sft", publish(store).key)


def test_nothing_is_computed_that_would_be_refused(tmp_path, keys):
    store = store_of(tmp_path, None, keys[1])
    with pytest.raises(ParamsError, match=r"sft would get none: set signatures\.private_key"):
        produce(store, "sft", document(), lambda *_: pytest.fail("computed"), recorded=pytest.fail)


def test_no_key_no_signature_and_no_library(project):
    code = (
        "import sys; from pathlib import Path; from rrlhf.pipeline.params import load_params\n"
        "from rrlhf.pipeline.plan import Project\n"
        "import rrlhf.cli, rrlhf.tools.signing\n"
        "root = Path(sys.argv[1]); project = Project(root, 'tiny', load_params(root, 'tiny'))\n"
        "project.plan(); project.check_keys()\n"
        "assert project.store.notary is None\n"
        "assert not {'model_signing', 'sigstore', 'cryptography', 'OpenSSL'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code, str(project)], cwd=project, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not (publish(Store(project)).path / SIGNATURE).exists()


def test_keys_are_checked_with_the_sources(project, monkeypatch):
    monkeypatch.chdir(project)
    wrong = {"signatures.private_key": "nowhere", "signatures.public_key": "nowhere.pub", "model.base": "gone"}
    with pytest.raises(ParamsError) as error:
        check_sources(Project(project, "tiny", load_params(project, "tiny", wrong)))
    assert {"gone", "nowhere", "nowhere.pub"} <= {
        word.strip(":'") for word in str(error.value).replace("/", " ").split()
    }


def test_keygen_makes_a_pair_that_only_its_owner_can_read_and_never_overwrites(tmp_path):
    private, public = written_pair(tmp_path / "new" / "key")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    notary_of(tmp_path, settings(private, public)).check()
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        written_pair(private)
    private.unlink()
    with pytest.raises(ValueError, match=r"key\.pub: exists already"):
        written_pair(private)
    assert not private.exists()
    assert public.read_bytes() == before[1]


@pytest.fixture
def unsigned(project, monkeypatch):
    """A project's folder with two artifacts from before there was a key."""
    monkeypatch.chdir(project)
    publish(Store(project))
    publish(Store(project), "reward", b"head")
    return project


def signed_by(private, models=None):
    sign(models, "tiny", [f"signatures.private_key={private}"])


def test_sign_signs_what_was_made_before_and_says_so(unsigned, keys, capsys):
    signed_by(keys[0])
    assert "2 signed, 0 had a signature" in capsys.readouterr().out
    store = store_of(unsigned, None, keys[1])
    assert [store.fault(artifact, deep=True) for artifact in store.all()] == [None, None]
    before = [sha256(path) for path in unsigned.glob(f"artifacts/*/*/{SIGNATURE}")]
    signed_by(keys[0])
    assert "0 signed, 2 had a signature" in capsys.readouterr().out
    assert [sha256(path) for path in unsigned.glob(f"artifacts/*/*/{SIGNATURE}")] == before


def test_sign_takes_the_models_that_are_named(unsigned, keys):
    reward = next(artifact for artifact in Store(unsigned).all() if artifact.name == "reward")
    signed_by(keys[0], [reward.digest[:8]])
    assert [path.parent.name for path in unsigned.glob(f"artifacts/*/*/{SIGNATURE}")] == [reward.key]


@pytest.mark.parametrize("name", ["model.bin", MANIFEST])
def test_sign_vouches_for_nothing_that_was_changed(unsigned, keys, name):
    changed = next(unsigned.glob(f"artifacts/sft/*/{name}"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    with pytest.raises(TamperedError, match=name):
        signed_by(keys[0])
    assert not list(unsigned.glob(f"artifacts/*/*/{SIGNATURE}"))


def test_sign_refuses_what_another_key_has_signed(unsigned, keys, other_keys):
    signed_by(other_keys[0])
    with pytest.raises(TamperedError, match="Key mismatch"):
        signed_by(keys[0])


def test_sign_without_a_key_says_how_to_get_one(unsigned):
    with pytest.raises(ValueError, match="rrlhf keygen"):
        sign(None, "tiny", None)


def test_mlflows_copy_is_signed_too_and_verified_when_it_is_brought_back(unsigned, keys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(unsigned, "rrlhf")
    sft = next(artifact for artifact in Store(unsigned).all() if artifact.name == "sft")
    tracker.register(sft, None, profile="default")
    store, away = store_of(unsigned, None, keys[1]), unsigned / "away"
    sft.path.rename(away)
    with pytest.raises(CopyError, match="expected a signature"):
        tracker.bring_back(store, "sft", sft.key)
    away.rename(sft.path)
    signed_by(keys[0])
    shutil.rmtree(sft.path)
    assert tracker.bring_back(store, "sft", sft.key).digest == sft.digest
    signed = publish(store_of(unsigned, *keys), seed=2)
    tracker.register(signed, None, profile="default")
    with tracker.models.copy(signed) as (folder, _):
        assert store.notary.fault(folder, deep=True) is None
