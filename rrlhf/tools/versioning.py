"""What DVC calls: the stages of dvc.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.environment import end_with_parent
from rrlhf.tools.command_line import Profile


def key(
    out: Annotated[Path, typer.Argument(help="File for the key document of the data set.")],
    profile: Profile = "default",
) -> None:
    """Write what the data set of a profile depends on; DVC calls this."""
    from rrlhf.pipeline.params import load_params
    from rrlhf.pipeline.plan import Project
    from rrlhf.pipeline.versioning.datasets import write_key

    root = Path.cwd()
    project = Project(root, profile, load_params(root, profile))
    write_key(out, project.document(project.nodes[0], {}))


def prepare(
    key: Annotated[Path, typer.Argument(help="Key document of the data stage.")],
    out: Annotated[Path, typer.Argument(help="Folder of the data set.")],
) -> None:
    """Make a data set from its key document; DVC calls this."""
    from rrlhf.files import clear
    from rrlhf.pipeline.artifacts import Store
    from rrlhf.pipeline.keys import key_digest
    from rrlhf.pipeline.launch import call

    end_with_parent()
    document = json.loads(key.read_bytes())
    store, digest = Store(Path.cwd()), key_digest(document)
    with store.locked(digest):
        staged = clear(store.staging("prepare", digest))
        call(document, inputs={}, out=staged, log=lambda row: None)
        clear(out).rmdir()
        staged.rename(out)
