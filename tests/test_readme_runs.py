"""The commands of the README and its guides, typed in order into one project with a default profile like tiny's."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PAGES = ["README.md", *(f"docs/{name}.md" for name in ("rewards", "policies", "comparing", "lineage", "caching"))]
TEXT = "\n".join((Path(__file__).parents[1] / page).read_text(encoding="utf-8") for page in PAGES)
COMMANDS = [shlex.split(line, comments=True) for line in dict.fromkeys(re.findall(r"^\$ (.+)$", TEXT, re.MULTILINE))]
TYPED = [command[1:] for command in COMMANDS if command[0] == "rrlhf"]
IN_SHORT = {"plan", "status"}  # these are in `make test` too; tests/test_pipeline.py has a run
BEFORE = [  # what they say was run before their examples
    ["run", "--profile", "tiny"],
    ["run", "--profile", "tiny", "--set", "prepare.flip_rate=0.4", "--set", "ppo.kl_weight=0.3"],
]
ELSEWHERE = {"chat", "experiment", "toy", "init"}  # each has its own tests
OTHERS = {"hh", "mine"}  # profiles whose data and models are not here; tests/test_own_models.py has the second
REFUSED = [
    ["promote", "rrlhf-tiny-policy@candidate", "--profile", "tiny"]
]  # a random model is no better than its start

pytestmark = pytest.mark.timeout(900)


def merged(below, above):
    """Settings with those of a profile over them."""
    return {
        name: merged(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
        for name, value in (below | above).items()
    }


@pytest.fixture(scope="module")
def typed_into(shared_project):
    """Type a command into the project; return its exit code and what it said."""
    settings = shared_project / "params.yaml"
    tiny = yaml.safe_load((shared_project / "profiles" / "tiny.yaml").read_text())
    small = merged(yaml.safe_load(settings.read_text()), tiny | {"seed": 2})  # results of its own, not those of tiny
    settings.write_text(yaml.safe_dump(small))
    (shared_project / "my_rules.py").write_text(
        "".join(re.findall(r"```python\n(def no_lists.*?)```", TEXT, re.DOTALL))
    )
    pair = {"chosen": "aeiou", "rejected": "xyz", "subset": "letters"}
    rows = [pair | {"id": n, "prompt": f"Say {n}."} for n in range(8)]
    (shared_project / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments):
        command = [sys.executable, "-m", "rrlhf", *arguments]
        done = subprocess.run(command, cwd=shared_project, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def as_here(arguments, call):
    """The arguments, with a row of this project's data in the place of the page's."""
    if "--row" not in arguments:
        return arguments
    told = call("diff", "rrlhf-tiny-policy/2", "rrlhf-tiny-policy/5")[1]
    return [*arguments[:-1], re.search(r"^  ~ (\w{12}) ->", told, re.MULTILINE)[1]]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(typed, id=" ".join(typed), marks=[] if " ".join(typed) in IN_SHORT else pytest.mark.slow)
        for typed in [*BEFORE, *TYPED]
        if typed[0] not in ELSEWHERE and OTHERS.isdisjoint(typed)
    ],
)
def test_a_command_of_the_docs_does_what_it_says(arguments, typed_into):
    code, said = typed_into(*as_here(arguments, typed_into))
    assert code == (1 if arguments in REFUSED else 0), said
