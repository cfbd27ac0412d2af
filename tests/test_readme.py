"""What the README and docs/ tell people to type and to open exists."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from rrlhf.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT): page.read_text(encoding="utf-8") for page in PAGES}
LINES = [line for text in TEXTS.values() for line in re.findall(r"^\$ (.+[^\\])$", text, re.MULTILINE)]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
LINKS = {(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)}


@pytest.mark.parametrize("arguments", [c[1:] for c in COMMANDS if c[0] == "rrlhf"], ids=" ".join)
def test_every_rrlhf_command_is_one_with_these_options(arguments):
    name, *rest = arguments
    group = typer.main.get_command(app)
    command = group.get_command(click.Context(group), name)
    assert command is not None
    command.make_context(name, rest)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_deployment_is_one_of_prefect_yaml():
    deployments = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    called = [command[3].split("/") for command in COMMANDS if command[:3] == ["prefect", "deployment", "run"]]
    assert called
    assert all(flow == "reward-robust-rlhf" and f"name: {name}\n" in deployments for flow, name in called)


@pytest.mark.parametrize(("page", "link"), sorted(LINKS), ids=str)
def test_every_link_leads_to_a_file(page, link):
    assert (ROOT / page.parent / link).exists()
