"""Ancestry is drawn from tags alone; the versions here are written by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rrlhf.lineage import as_json, resolve, tree
from rrlhf.tracking import Version

DATA = "md5:d41d8cd98f00b204e9800998ecf8427e.dir"


def version(name, number, node, digest, inputs, aliases=()):
    tags = {"rrlhf.node": node, "rrlhf.digest": digest * 64, "rrlhf.inputs": json.dumps(inputs)}
    return Version(name, number, tuple(aliases), tags | {"rrlhf.dataset_name": "default"})


SFT = version("rrlhf-sft", "1", "sft", "a", {"data": DATA})
REWARD = version("rrlhf-reward", "1", "reward", "b", {"data": DATA, "sft": "a" * 64})
POLICY = version(
    "rrlhf-policy", "2", "ppo-robust", "c", {"sft": "a" * 64, "reward": "b" * 64, "data": DATA}, ["candidate"]
)
LOST = version("rrlhf-policy", "1", "ppo-single", "d", {"ensemble": "e" * 64})
VERSIONS = [LOST, POLICY, REWARD, SFT]


def test_a_tree_reaches_the_data_set_and_draws_a_shared_node_once():
    assert tree(POLICY, VERSIONS).splitlines() == [
        "rrlhf-policy v2 (candidate) · ppo-robust · cccccccc",
        "├── data default md5:d41d8cd9",
        "├── rrlhf-reward v1 · reward · bbbbbbbb",
        "│   ├── data default md5:d41d8cd9",
        "│   └── rrlhf-sft v1 · sft · aaaaaaaa",
        "│       └── data default md5:d41d8cd9",
        "└── rrlhf-sft v1 · sft · aaaaaaaa (see above)",
    ]


def test_an_input_that_nobody_registered_is_named_by_its_digest():
    assert tree(LOST, VERSIONS).splitlines()[1] == "└── ensemble · eeeeeeee (not registered)"


@pytest.mark.parametrize("reference", ["rrlhf-policy@candidate", "rrlhf-policy/2", "cccccc", "models:/rrlhf-policy/2"])
def test_a_version_is_found_by_alias_number_or_digest(reference):
    assert resolve(reference, VERSIONS) == POLICY


def test_the_newest_of_several_versions_with_one_content_is_found():
    newer = version("rrlhf-sft", "2", "sft", "a", {"data": DATA})
    assert resolve("aaaaaa", [newer, *VERSIONS]) == newer


def test_an_unknown_reference_gets_the_close_ones():
    with pytest.raises(ValueError, match="close: rrlhf-policy@candidate"):
        resolve("rrlhf-policy@candidat", VERSIONS)


def test_a_digest_start_that_fits_two_versions_is_refused():
    one, two = SFT, version("rrlhf-sft", "2", "sft", "a", {})
    two.tags["rrlhf.digest"] = "a" * 10 + "b" * 54
    with pytest.raises(ValueError, match="begins several digests"):
        resolve("aaaaaa", [two, one])


def test_an_empty_server_says_so():
    with pytest.raises(ValueError, match="none is registered yet"):
        resolve("rrlhf-policy@candidate", [])


def test_json_holds_the_whole_ancestry():
    nested = as_json(POLICY, VERSIONS)
    assert nested["inputs"]["reward"]["inputs"]["sft"]["digest"] == "a" * 64
    assert nested["inputs"]["sft"]["inputs"]["data"] == {"dataset": "default", "digest": DATA}


def test_lineage_starts_without_the_heavy_libraries():
    code = "import sys, rrlhf.lineage; print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
