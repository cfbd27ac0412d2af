"""The commands about signatures: `rrlhf keygen` makes the keys, `rrlhf sign` signs what was made without them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.config import Signatures
from rrlhf.located import UsageError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import SIGNATURE, Artifact, TamperedError
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.signatures import INSTALL, Notary
from rrlhf.pipeline.store import Store
from rrlhf.progress import track
from rrlhf.tools.command_line import Profile, Set, opened
from rrlhf.tools.lineage.lookup import Lookup


def keygen(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New file for the private key; PATH.pub, the public.")],
) -> None:
    """Make a pair of keys (P-256) for signing artifacts and for verifying who made them.

    1. Make the pair outside the project, and keep the private key to yourself; it has no password.

    2. In params.yaml, signatures.private_key: PATH has every artifact that is made here signed, and
    signatures.public_key: PATH.pub has every artifact that is read verified: by run, plan, chat, promote, audit and
    the rest. One that is not signed by this key is refused with exit code 3.

    3. `rrlhf sign` signs what was made before there was a key.

    Who has PATH.pub and no private key can verify all of it, also without this package: model_signing verify key
    FOLDER --signature FOLDER/model.sig --public_key PATH.pub

    Example: rrlhf keygen ~/.config/rrlhf/key
    """
    private = path.expanduser()
    for each in written_pair(private):
        print(each)
    print(f"params.yaml:  signatures: {{private_key: {private}, public_key: {private}.pub}}")


def sign(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="rrlhf-policy@candidate, rrlhf-policy/3, the start of a digest, or a folder; left out, every artifact "
            "of the store.",
        ),
    ] = None,
    profile: Profile = "default",
    set_: Set = None,
) -> None:
    """Sign artifacts that were made without signatures.private_key, after reading every byte of them.

    A signature vouches: look at them first (`rrlhf audit --deep`). All are checked before the first is signed. One
    that another key has signed is refused; to change keys, verify it with the old key, then remove its model.sig.
    MLflow's and DVC's copies get the signature too.

    Example: rrlhf sign

    Example: rrlhf sign rrlhf-policy@candidate --set signatures.private_key=~/.config/rrlhf/key
    """
    from rrlhf.pipeline.tracking.server import database
    from rrlhf.pipeline.tracking.tracker import Tracker

    lookup = opened(profile, set_)
    root, notary = lookup.root, lookup.store.notary
    if notary is None or not notary.signs:
        raise UsageError(
            "signatures.private_key is null: `rrlhf keygen PATH` makes a pair of keys; then set it in params.yaml"
        )
    notary.check()
    store = Store(root)
    folders = [folder for folder in sorted(store.root.glob("[!.]*/*")) if folder.is_dir()]
    every = (store.find(folder.parent.name, folder.name) for folder in folders)
    artifacts = _named(lookup, models) if models else [found for found in every if found]
    new = _unsigned(store, artifacts, notary)
    for artifact in new:
        notary.sign(artifact.path)
        if artifact.name == DATA:
            dvc.keep(root, artifact.path)
        print(f"signed {artifact.name} {artifact.digest[:8]}")
    file, copies = database(root), 0
    if file is None or file.exists():  # MLflow's copies, from which lost artifacts are brought back
        tracker = Tracker(root, lookup.params.tracking.experiment)
        copies = sum(tracker.models.add_signature(artifact) for artifact in artifacts)
    print(f"{len(new)} signed, {len(artifacts) - len(new)} had a signature; {copies} copies in MLflow have it too")


def written_pair(private: Path) -> list[Path]:
    """Write a private key, readable by its owner alone, and beside it PATH.pub; return both.

    Raises ValueError when a file is there already or the library is missing: neither is ever overwritten.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    except ImportError:
        raise ValueError(f"keys are made by a library that is not installed: {INSTALL}") from None
    public = private.with_name(f"{private.name}.pub")
    for path in (private, public):
        if path.exists():
            raise UsageError(f"{path}: exists already, and a key is never overwritten; name a new file")
    key = ec.generate_private_key(ec.SECP256R1())
    private.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return [private, public]


def _named(lookup: Lookup, models: Sequence[str]) -> list[Artifact]:
    """Find artifacts as other commands do, but whether they are signed or not."""
    unsigned = lookup.params.model_copy(update={"signatures": Signatures(private_key=None, public_key=None)})
    lookup = Lookup(lookup.root, lookup.profile, unsigned)
    return list({found.path: found for found in map(lookup.find, models)}.values())


def _unsigned(store: Store, artifacts: Sequence[Artifact], notary: Notary) -> list[Artifact]:
    """Return those without a signature. Raises TamperedError with everything that must not be signed."""
    problems, found = [], []
    for artifact in track(artifacts, len(artifacts), "reading artifacts"):
        problem = store.fault(artifact, deep=True)
        if problem is None and not (artifact.path / SIGNATURE).exists():
            found.append(artifact)
        elif problem or (problem := notary.fault_of_own(artifact.path)):
            problems.append(problem)
    if problems:
        raise TamperedError("\n".join([*problems, "nothing was signed"]))
    return found
