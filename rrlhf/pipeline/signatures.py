"""Signatures of artifacts: who made them, which a seal cannot tell (OpenSSF model signing, elliptic-curve keys).

`model.sig` in an artifact's folder is a Sigstore bundle around an in-toto statement that lists artifact.json and every
file with its sha256. `model_signing verify key` reads the same folder without this package.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rrlhf.config import Signatures
from rrlhf.files import sync
from rrlhf.located import ParamsError
from rrlhf.memo import Memory, sha256
from rrlhf.pipeline.artifacts import MANIFEST, SIGNATURE

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
        """Raise ParamsError with every mistake in the keys, before anything is computed.

        From then on the private key is kept: its file may vanish, a long run still signs.
        """
        _ = self._publics, self._signing if self.signs else None

    def check_making(self, names: Iterable[str]) -> None:
        """Raise ParamsError when something is to be made that would be refused for lack of a signature."""
        making = ", ".join(names)
        if making and self.verifies and not self.signs:
            raise ParamsError(
                f"signatures.public_key asks for signatures, and {making} would get none: set signatures.private_key, "
                "or signatures.public_key=null for this run"
            )

    def sign(self, folder: Path) -> None:
        """Write the signature of a folder that holds a complete artifact."""
        beside = folder.parent / f".{folder.name}.sig"
        self._signing.sign(folder, beside)
        sync(beside)
        beside.replace(folder / SIGNATURE)

    def fault(self, folder: Path, *, deep: bool = False) -> str | None:
        """Say what is wrong with the signature of an artifact's folder, or None; None too without a public key.

        One that was found valid before is not verified again, unless deep: that the files are still those of
        artifact.json is for the store to tell.
        """
        if not self.verifies:
            return None
        public = self._publics["public"]
        try:
            parts = [hashlib.sha256(public).hexdigest(), sha256(folder / SIGNATURE), sha256(folder / MANIFEST)]
        except FileNotFoundError as error:
            return (
                f"{error.filename}: expected a signature by {self._paths['public']}, found no file; what was made "
                "before there was a key gets one by `rrlhf sign`"
            )
        known = hashlib.sha256("".join(parts).encode()).hexdigest()
        if known in self._memory.known and not deep:
            return None
        problem = invalid(folder, public, str(self._paths["public"]))
        if problem is None:
            self._memory.known[known] = True
            self._memory.grew = True
            self._memory.save()
        return problem

    def fault_of_own(self, folder: Path) -> str | None:
        """Say why a signature is none by the private key, or None."""
        return invalid(folder, self._publics["private"], f"the public half of {self._paths['private']}")

    @cached_property
    def _signing(self) -> Any:  # model_signing.signing.Config
        from model_signing import signing

        configured = signing.Config().use_elliptic_key_signer(private_key=self._paths["private"])
        return configured.set_hashing_config(_everything())

    @cached_property
    def _publics(self) -> dict[Which, bytes]:
        """The public half of each key, in PEM. Raises ParamsError with every mistake."""
        if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
            raise ParamsError(f"signatures: the library that signs and verifies is not installed: {INSTALL}")
        found: dict[Which, bytes] = {}
        mistakes = []
        for which, path in self._paths.items():
            try:
                found[which] = _public_half(which, path)
            except ValueError as error:
                mistakes.append(f"signatures.{which}_key: {path}: {error}; `rrlhf keygen PATH` makes a pair of keys")
        if len(set(found.values())) > 1:
            mistakes.append(
                "signatures.public_key is not the other half of signatures.private_key: what is made would be refused; "
                f"name {self._paths['private']}.pub if `rrlhf keygen` made the pair"
            )
        if mistakes:
            raise ParamsError("\n".join(mistakes))
        return found


def notary_of(root: Path, settings: Signatures) -> Notary | None:
    """Return what signs and verifies by these settings; None when they name no key."""
    return Notary(root, settings) if settings.private_key is not None or settings.public_key is not None else None


def invalid(folder: Path, public: bytes, named: str) -> str | None:
    """Say why an artifact's folder has no valid signature of all its files by a public key (PEM), or None.

    named: what to call the key.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    with tempfile.TemporaryDirectory(prefix="rrlhf-key-") as beside:
        key = Path(beside) / "public.pem"
        key.write_bytes(public)
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_everything())
        try:
            verifier.verify(folder, folder / SIGNATURE)
        except InvalidSignature:
            reason = "this key did not make it"
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        else:
            return None
    return f"{folder / SIGNATURE}: expected a signature by {named}: {reason.rstrip('. ')}"


def _everything() -> Any:  # model_signing.hashing.Config
    """Return the library's hashing of every file but the signature, whatever a signature asks to leave out."""
    from model_signing import hashing

    class Everything(hashing.Config):  # type: ignore[misc]
        def add_ignored_paths(self, **asked: Any) -> None:
            pass

    return Everything().set_ignored_paths(paths=[SIGNATURE])


def _public_half(which: Which, path: Path) -> bytes:
    """Return the public half of a key in PEM. Raises ValueError that says what it should be."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
        load_pem_public_key,
    )

    try:
        content = path.read_bytes()
        key: Any = (
            load_pem_private_key(content, None).public_key() if which == "private" else load_pem_public_key(content)
        )
        if key.curve.name in CURVES:
            public: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            return public
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (TypeError, ValueError, AttributeError, UnsupportedAlgorithm):
        pass  # with a password, no key, or one of another kind
    raise ValueError(f"not a {which} key on {', '.join(CURVES.values())} in PEM form without a password")
