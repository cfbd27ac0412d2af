"""`rrlhf init`: a project to begin with, made of the files that rrlhf's own repository is a project by."""

import os
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.located import UsageError
from rrlhf.pipeline.dvc import is_under_git

PACKAGE = Path(__file__).parents[1]
NEXT = """made {files} files in {root}
{enter}
  rrlhf run --profile tiny    # everything, in a minute, on a random model
  rrlhf plan                  # what the settings in params.yaml would do; then: rrlhf run
  git add . && git commit     # settings, flows, and later the names of data sets (*.dvc)"""


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made if need be; left out: this one.")] = Path(),
) -> None:
    """Make a project: params.yaml, profiles and experiments, the flows, and what DVC, Prefect and git need.

    Nothing is overwritten: with any of the files there already, it names them and makes none. Every file is yours to
    change from then on.

    Example: rrlhf init my-project
    """
    root, files = folder.absolute(), project_files()
    if there := [name for name in files if os.path.lexists(root / name)]:
        raise UsageError(f"{root}: nothing was made, for it has {', '.join(there)} already")
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / name)
    if not is_under_git(root) and shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    enter = "" if root == Path.cwd() else f"\n  cd {shlex.quote(str(folder))}"
    print(NEXT.format(files=len(files), root=root, enter=enter))


def project_files() -> dict[str, Path]:
    """Return the files of a project by their names in it: in a wheel those beside the package, or the repository's."""
    root = PACKAGE / "project"
    if root.is_dir():
        found = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    else:
        root = PACKAGE.parent
        kept = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
        found = [path for pattern in kept["package-data"]["rrlhf.project"] for path in sorted(root.glob(pattern))]
    return {path.relative_to(root).as_posix(): path for path in found}
