"""A project in which everything was made and registered, as by `rrlhf run`, but in this process and without Prefect."""

import os
from contextlib import chdir, contextmanager
from unittest.mock import patch

from rrlhf.environment import set_environment
from rrlhf.files import clear
from rrlhf.pipeline import dvc
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import aliases_of
from rrlhf.pipeline.tracking.tracker import Tracker


@contextmanager
def at_work(root):
    """Have this process work in a project's folder; everything that it changes is put back."""
    with chdir(root), patch.dict(os.environ):
        os.environ.pop("PREFECT_HOME", None)  # of another project
        set_environment(root)
        yield


class Finished:
    """The results of the tiny profile with some settings changed."""

    def __init__(self, root, overrides):
        self.root, self.overrides = root, overrides
        self.tracker = Tracker(root, "rrlhf")
        self.artifacts = {}
        project = self.project
        for node in project.nodes:
            self._make(project, node)
        dvc.keep(root, self.data.path)
        for node in project.nodes[1:]:
            dataset = self.data.dataset if DATA in node.inputs.values() else None
            aliases = aliases_of(node.arm, project.params.tracking.candidate)
            self.tracker.register(self.artifacts[node.name], dataset, profile="tiny", aliases=aliases)

    def _make(self, project, node):
        digests = {name: made.digest for name, made in self.artifacts.items()}
        document = project.document(node, digests)
        staged = clear(project.store.staging(node.stage, key_digest(document)))
        inputs = {argument: self.artifacts[name].path for argument, name in node.inputs.items()}
        execute(document, inputs=inputs, out=staged, launch=project.params.launch)
        self.artifacts[node.name] = project.store.publish(
            node.name,
            document,
            staged,
            seconds=1.0,
            dataset=about(self.data.dataset, project.params.prepare) if node.inputs else {},
            input_keys={argument: self.artifacts[name].key for argument, name in node.inputs.items()},
            profile="tiny",
        )

    @property
    def data(self):
        """The data set."""
        return self.artifacts[DATA]

    @property
    def project(self):
        """The project with these settings, as it is now."""
        return Project(self.root, "tiny", load_params(self.root, "tiny", self.overrides))
