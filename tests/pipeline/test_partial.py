"""Parts of the graph: what --from, --until, --only and --force mean."""

from pathlib import Path

import pytest

from rrlhf.located import ParamsError
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.params import load_params

NODES = nodes(load_params(Path(__file__).parents[2], "tiny"))
EVERYTHING = {node.name for node in NODES}
ARMS = {"ppo-single", "ppo-robust", "dpo-direct", "best_of_n-choosy"}


def allowed(**part):
    return chosen(Part(**{name: tuple(names.split()) for name, names in part.items()}), NODES).allowed


def test_nothing_said_is_everything():
    assert allowed() == EVERYTHING


def test_from_is_a_stage_and_what_is_built_on_it():
    assert allowed(start="ensemble") == {"ensemble", "evaluate"} | ARMS - {"dpo-direct"}
    assert allowed(start="data") == EVERYTHING


def test_until_is_a_stage_and_what_it_is_built_on():
    assert allowed(until="dpo-direct") == {"data", "sft", "dpo-direct"}
    assert allowed(until="evaluate") == EVERYTHING


def test_from_with_until_is_what_lies_between():
    assert allowed(start="reward", until="ppo") == {"reward", "ensemble", "ppo-single", "ppo-robust"}


def test_a_stage_means_all_its_nodes_and_a_node_itself():
    assert allowed(only="ppo") == {"ppo-single", "ppo-robust"}
    assert allowed(only="ppo-robust prepare") == {"ppo-robust", "data"}


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (Part(until=("sft",), only=("sft",)), "goes with neither --from nor --until"),
        (Part(start=("evaluate",), until=("sft",)), "nothing lies between them"),
        (Part(force=("sft",), start=("reward",)), "--force sft: the other options leave it out"),
        (Part(only=("ensembel",)), "--only ensembel: no stage 'ensembel': did you mean ensemble?"),
        (Part(force=("ppo-robst",)), "did you mean ppo-robust?"),
    ],
)
def test_what_makes_no_sense_is_said(part, told):
    with pytest.raises(ParamsError) as caught:
        chosen(part, NODES)
    assert told in str(caught.value)


def test_all_unknown_names_are_told_at_once():
    with pytest.raises(ParamsError) as caught:
        chosen(Part(start=("rewrad",), force=("stf",)), NODES)
    assert len(str(caught.value).splitlines()) == 2
