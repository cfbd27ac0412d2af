"""`rrlhf push`: a model with its card to the Hugging Face hub, through the hub's own library."""

from typing import Annotated

import typer

from rrlhf.located import MendableError, UsageError
from rrlhf.tools.command_line import Model, Profile, opened

TEXTS = ["rollouts.parquet", "samples.json"]  # prompts and responses of the training: data, and no part of a model


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if need be.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show what would go, and send nothing.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made is for everybody to read.")
    ] = False,
    profile: Profile = "default",
) -> None:
    """Send a model with its card to the Hugging Face hub, after reading every byte of it.

    What goes is its folder: the weights, the card (README.md), the manifest (artifact.json) and the logged numbers;
    the prompts and responses of a training stay here. Files of these names are replaced, others in the repository
    stay. Who you are is known from HF_TOKEN or `hf auth login`; HF_ENDPOINT names a hub of your own.

    Example: rrlhf push rrlhf-policy@champion my-team/my-policy --dry-run
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from rrlhf.pipeline.artifacts import CARD, TamperedError
    from rrlhf.pipeline.cards import title

    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UsageError(str(error)) from None
    lookup = opened(profile)
    artifact = lookup.find(model)
    if problem := lookup.store.fault(artifact, deep=True):
        raise TamperedError(problem)
    if CARD not in artifact.manifest["files"]:
        raise UsageError(f"{model}: {artifact.name} is no model, and has no card")
    ModelCard.load(artifact.path / CARD)  # raises ValueError for what the hub cannot read
    api, files = HfApi(library_name="rrlhf"), [path for path in sorted(artifact.path.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(artifact.path): path.stat().st_size for path in files if path.name not in TEXTS}
    for name, size in sizes.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(sizes.values()):>15,}  bytes {'would go' if dry_run else 'go'} to {api.endpoint}/{repository}")
    if dry_run:
        return
    told = f"{title(artifact.manifest)} ({artifact.digest[:12]})"
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        sent = api.upload_folder(
            repo_id=made.repo_id, folder_path=artifact.path, ignore_patterns=TEXTS, commit_message=told
        )
    except Exception as error:  # noqa: BLE001 - whatever the hub's client asks with raises: it is told
        raise MendableError(f"{api.endpoint}, asked by HF_TOKEN or `hf auth login`, took nothing: {error}") from None
    print(sent.commit_url)
