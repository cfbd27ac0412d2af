"""Signatures of artifacts: who made them, which a seal cannot tell (OpenSSF model signing, elliptic-curve keys).

`model.sig` in an artifact's folder is a Sigstore bundle around an in-toto statement that lists artifact.json and every
file with its sha256. The digests are those of artifact.json, which the store holds against the files: no file is read
a second time to be signed or verified. `model_signing verify key` reads the same folder without this package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rrlhf.config import Signatures
from rrlhf.files import sync
from rrlhf.located import ParamsError
from rrlhf.memo import Memory, sha256
from rrlhf.pipeline.artifacts import MANIFEST, SIGNATURE
from rrlhf.pipeline.seal import opened

INSTALL = "pip install 'rrlhf[sign]'"
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}

Which = Literal["private", "public"]


class Notary:
    """Has the keys of one project: signs what is published, and verifies what is read. Made by `notary_of`.

    signs, verifies: which of the two it does. Keys are read when they are first needed, and then kept.
    """

    def __init__(self, root: Path, settings: Signatures) -> None:
        given: dict[Which, str | None] = {"private": settings.private_key, "public": settings.public_key}
        self._paths = {which: root / Path(text).expanduser() for which, text in given.items() if text is not None}
        self._memory = Memory(root / ".rrlhf" / "signatures.json")
        self.signs, self.verifies = "private" in self._paths, "public" in self._paths

    def check(self) -> None:
        """Raise ParamsError with every mistake in the keys, before anything is computed."""
        if mistakes := list(self._mistakes()):
            raise ParamsError("\n".join(mistakes))

    def prepare(self) -> None:
        """Raise what `check` does, and keep the private key: its file may vanish, a long run still signs."""
        self.check()
        if self.signs:
            _ = self._signing

    def check_making(self, names: Iterable[str]) -> None:
        """Raise ParamsError when something is to be made that would be refused for lack of a signature."""
        making = ", ".join(names)
        if making and self.verifies and not self.signs:
            raise ParamsError(
                f"signatures.public_key asks for signatures, and {making} would get none: set signatures.private_key, "
                "or signatures.public_key=null for this run"
            )

    def sign(self, folder: Path) -> None:
        """Write the signature of a folder that holds a complete artifact; its files are taken to be as listed."""
        beside = folder.parent / f".{folder.name}.sig"
        self._signing.sign(folder, beside)
        sync(beside)
        beside.replace(folder / SIGNATURE)

    def fault(self, folder: Path, *, deep: bool = False) -> str | None:
        """Say what is wrong with the signature of an artifact's folder, or None; None too without a public key.

        Holds it against artifact.json alone: that the files are those of artifact.json is for the store to tell.
        deep: verify anew, although this signature of this artifact.json was found valid before.
        """
        if not self.verifies:
            return None
        key = hashlib.sha256(self._public).hexdigest()
        try:
            parts = [key, sha256(folder / SIGNATURE), sha256(folder / MANIFEST)]
        except FileNotFoundError as error:
            return (
                f"{error.filename}: expected a signature by {self._paths['public']}, found no file; what was made "
                "before there was a key gets one by `rrlhf sign`"
            )
        known = hashlib.sha256("".join(parts).encode()).hexdigest()
        if known in self._memory.known and not deep:
            return None
        problem = invalid(folder, self._public, str(self._paths["public"]))
        if problem is None:
            self._memory.known[known] = True
            self._memory.grew = True
            self._memory.save()
        return problem

    def fault_of_own(self, folder: Path) -> str | None:
        """Say why a signature is none by the private key, or None."""
        key = _loaded("private", self._paths["private"]).public_key()
        return invalid(folder, _public_pem(key), f"the public half of {self._paths['private']}")

    @cached_property
    def _signing(self) -> Any:  # model_signing.signing.Config
        from model_signing import signing

        configured = signing.Config().use_elliptic_key_signer(private_key=self._paths["private"])
        return configured.set_hashing_config(_Listed())

    @cached_property
    def _public(self) -> bytes:
        """The public key in the one PEM form that signatures name it by."""
        if mistakes := list(self._mistakes(("public",))):
            raise ParamsError("\n".join(mistakes))
        return _public_pem(_loaded("public", self._paths["public"]))

    def _mistakes(self, wanted: tuple[Which, ...] = ("private", "public")) -> Iterator[str]:
        if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
            yield f"signatures: the library that signs and verifies is not installed: {INSTALL}"
            return
        pems = {}
        for which in wanted:
            if which in self._paths:
                try:
                    key = _loaded(which, self._paths[which])
                    pems[which] = _public_pem(key.public_key() if which == "private" else key)
                except ParamsError as error:
                    yield f"signatures.{which}_key: {error}"
        if len(set(pems.values())) > 1:
            yield (
                "signatures.public_key is not the other half of signatures.private_key: what is made would be refused; "
                f"name {self._paths['private']}.pub if `rrlhf keygen` made the pair"
            )


class _Listed:
    """What the library calls a hashing configuration: it takes the digests from artifact.json."""

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:  # model_signing.manifest.Manifest
        """Return the library's description of a folder: artifact.json and all that it lists."""
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        items = [
            manifest.FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(digest)))
            for name, digest in _digests(Path(model_path)).items()
        ]
        kind = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
        return manifest.Manifest(Path(model_path).name, items, manifest.SerializationType.from_args(kind))

    def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
        """Ignore nothing, whatever a signature asks for: it has to list every file of the artifact."""


def notary_of(root: Path, settings: Signatures) -> Notary | None:
    """Return what signs and verifies by these settings; None when they name no key."""
    return Notary(root, settings) if settings.private_key is not None or settings.public_key is not None else None


def invalid(folder: Path, public: bytes, named: str) -> str | None:
    """Say why an artifact's folder has no valid signature by a public key (PEM), or None. Reads no payload files.

    named: what to call the key.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying
    from sigstore_models.bundle.v1 import Bundle

    signature = folder / SIGNATURE
    try:
        text = signature.read_text(encoding="utf-8")
        bundle = json.loads(text)
        signer = bundle["verificationMaterial"]["publicKey"]["hint"]
        if signer != hashlib.sha256(public).hexdigest():
            return f"{signature}: expected a signature by {named}, found one by another key, {str(signer)[:16]}"
        if Bundle.from_dict(bundle).to_json() != text:  # what the signature does not cover, and base64's spare bits
            raise ValueError("it is not as it was written")
        with tempfile.TemporaryDirectory(prefix="rrlhf-key-") as beside:
            path = Path(beside) / "public.pem"
            path.write_bytes(public)
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=path)
            verifier.set_hashing_config(_Listed()).verify(folder, signature)
    except InvalidSignature:
        return f"{signature}: expected a signature by {named}, found one that this key did not make"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        if str(error).startswith("Signature mismatch"):  # a good signature, of other content
            return f"{signature}: {named} has signed other content: {', '.join(_differing(folder, bundle))}"
        reason = str(error).partition("\n")[0]
        return f"{signature}: expected a signature by {named}, found none in it ({type(error).__name__}: {reason})"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of artifact.json and of every file that it lists, as listed."""
    content = (folder / MANIFEST).read_bytes()
    listed: dict[str, str] = opened(content)["files"]
    return listed | {MANIFEST: hashlib.sha256(content).hexdigest()}


def _differing(folder: Path, bundle: Any) -> list[str]:
    """Name the files that are not as a valid signature has them."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
    here = _digests(folder)
    return sorted(name for name in {*signed, *here} if signed.get(name) != here.get(name))


def _loaded(which: Which, path: Path) -> Any:  # an elliptic-curve key of cryptography
    """Read a key. Raises ParamsError that says what it should be."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        content = path.read_bytes()
        key = load_pem_private_key(content, None) if which == "private" else load_pem_public_key(content)
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; `rrlhf keygen PATH` makes a pair of keys") from None
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}") from None
    except TypeError:
        raise ParamsError(f"{path}: it has a password; keep it without one, readable by its owner alone") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ParamsError(f"{path}: not a {which} key in PEM form; `rrlhf keygen PATH` makes a pair of keys") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise ParamsError(f"{path}: expected a key on one of the curves {', '.join(CURVES.values())}")
    return key


def _public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    content: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return content
