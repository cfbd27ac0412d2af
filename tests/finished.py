"""A project in which everything was made and registered, as by `rrlhf run`, but in this process and without Prefect."""

from contextlib import contextmanager

import pytest

from rrlhf.environment import set_environment
from rrlhf.files import clear
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import aliases_of
from rrlhf.pipeline.tracking import Tracker
from rrlhf.pipeline.versioning.datasets import prepare_dataset


@contextmanager
def at_work(root):
    """Have this process work in a project's folder; everything that it changes is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PATH", "")  # restored afterwards: set_environment changes it
        set_environment(root)
        yield


class Finished:
    """The results of the tiny profile with some settings changed."""

    def __init__(self, root, overrides):
        self.root, self.overrides = root, overrides
        self.tracker = Tracker.connect(root, "rrlhf")
        self.artifacts = {}
        project = self.project
        data, *models = project.nodes
        document = project.document(data, {})
        self.data = prepare_dataset(root, project.place(document), document)
        for node in models:
            self._make(project, node)
            dataset = self.data if DATA in node.inputs.values() else None
            aliases = aliases_of(node.arm, project.params.tracking.candidate)
            self.tracker.register(self.artifacts[node.name], dataset, profile="tiny", aliases=aliases)

    def _make(self, project, node):
        folders = {DATA: self.data.path} | {name: made.path for name, made in self.artifacts.items()}
        digests = {DATA: self.data.digest} | {name: made.digest for name, made in self.artifacts.items()}
        document = project.document(node, digests)
        staged = clear(project.store.staging(node.stage, key_digest(document)))
        inputs = {argument: folders[name] for argument, name in node.inputs.items()}
        execute(document, inputs=inputs, out=staged, log=lambda row: None, launch=project.params.launch)
        self.artifacts[node.name] = project.store.publish(
            node.name,
            document,
            staged,
            seconds=1.0,
            dataset=about(self.data, project.params.prepare),
            input_keys={argument: self.artifacts[name].key for argument, name in node.inputs.items() if name != DATA},
            profile="tiny",
        )

    @property
    def project(self):
        """The project with these settings, as it is now."""
        return Project(self.root, "tiny", load_params(self.root, "tiny", self.overrides))
