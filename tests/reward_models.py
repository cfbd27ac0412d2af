"""The reward models of the tiny profile under some settings, made stage by stage."""

from conftest import ROOT

from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_document
from rrlhf.pipeline.launch import call
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.scoring import load_reward_model


class Made:
    """The reward models of one set of overrides: folders by node name, and the rows that they logged."""

    def __init__(self, start, root, overrides):
        self.start, self.root, self.rows = start, root, {}
        self.params = load_params(ROOT, "tiny", overrides)
        self.folders = {"data": start / "data", "sft": start / "sft"}
        for node in nodes(self.params):
            if node.stage in {"given", "reward", "member", "ensemble"}:
                self.run(node)

    def run(self, node):
        out, self.rows[node.name] = self.root / node.name, []
        out.mkdir()
        inputs = {argument: self.folders[name] for argument, name in node.inputs.items()}
        call(key_document(node, {}), inputs=inputs, out=out, log=self.rows[node.name].append)
        self.folders[node.name] = out

    def model(self, name):
        return load_reward_model(self.root / name, self.start / "sft")
