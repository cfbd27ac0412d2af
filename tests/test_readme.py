"""What the README tells people to type and to open exists."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from rrlhf.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE)]


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


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_every_link_leads_to_a_file(link):
    assert (ROOT / link).exists()
