"""Whatever is edited, deleted, tampered with or taken back, the plan says what a run then does, and for what reason.

A pipeline of tiny stages in a package of its own goes through the real keys, store and plan. What must happen is told
by a model that knows neither files nor digests: it compares settings, numbers in the code, and values.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from importlib import import_module, invalidate_caches
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrlhf.pipeline.artifacts import HISTORY, TamperedError
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.modules import Modules
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.produce import carry_out

PARAMS = load_params(Path(__file__).parents[2], "tiny")

# {0} stands for a number that edits change, {note} for what is no code.
SOURCES = {
    "__init__": '"""{note}"""\n',
    "stages/__init__": '"""{note}"""\n',
    "stages/prepare": '''"""{note}"""
from pathlib import Path
import json

def run(model, prepare, out):
    value = int(Path(prepare.source).read_text()) + {0}
    (out / "value.json").write_text(json.dumps(value))
''',
    "maths": '''# {note}
OFFSET = {0}

def scaled(value, factor):
    """{note}"""
    return value * factor + {1}
''',
    "stages/scale": '''"""{note}"""
import json

def run(factor, read, out):
    from tiny.maths import scaled
    value = scaled(json.loads((read / "value.json").read_text()), factor) + {0}
    (out / "value.json").write_text(json.dumps(value))
''',
    "parts/__init__": '''"""{note}"""
LEVEL = {0}  # {note}
''',
    "parts/deep": '''"""{note}"""''',
    "stages/join": '''"""{note}"""
import json
from .. import maths
from ..parts import LEVEL

class Sum:
    def of(self, folders):
        return sum(json.loads((folder / "value.json").read_text()) for folder in folders) + maths.OFFSET

def run(left, right, out):
    value = (Sum().of([left, right]) + LEVEL) // 10 + {0}
    (out / "value.json").write_text(json.dumps(value))
''',
    "stages/end": '''"""{note}"""
import json
import tiny.parts.deep

def run(weight, join, left, out):
    value = json.loads((join / "value.json").read_text()) * weight + tiny.parts.LEVEL + {0}
    (out / "value.json").write_text(json.dumps(value))
''',
    "aside": "ANSWER = {0}  # {note}: imported by no stage\n",
}
DEFINITIONS = {  # of every number in the sources
    "stages/prepare": ["run"],
    "maths": ["OFFSET", "scaled"],
    "stages/scale": ["run"],
    "parts/__init__": ["LEVEL"],
    "stages/join": ["run"],
    "stages/end": ["run"],
    "aside": ["ANSWER"],
}
USED = {  # by every stage, at any depth: module and number in it
    "prepare": [("stages/prepare", 0)],
    "scale": [("stages/scale", 0), ("maths", 1)],
    "join": [("stages/join", 0), ("maths", 0), ("parts/__init__", 0)],
    "end": [("stages/end", 0), ("parts/__init__", 0)],
}
GRAPH = [  # node, stage, its parameters, its inputs
    ("read", "prepare", [], {}),
    ("left", "scale", ["factor"], {"read": "read"}),
    ("right", "scale", ["factor"], {"read": "read"}),
    ("join", "join", [], {"left": "left", "right": "right"}),
    ("end", "end", ["weight"], {"join": "join", "left": "left"}),
]
STAGES = {name: stage for name, stage, _, _ in GRAPH}
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files: no disk needed


class World:
    """A project folder, and what the model knows of it."""

    def __init__(self, root):
        self.root = root
        self.source = "11"
        self.code = {(module, i): 0 for module, names in DEFINITIONS.items() for i in range(len(names))}
        self.params = {"left.factor": 2, "right.factor": 3, "end.weight": 1}
        self.made = {}  # what a result is made of -> (the node that made it, value)
        self.ever = set()
        self.tampered = {}  # what a result is made of -> file, sound bytes
        self.folders = {}
        self.snapshots = []
        self.write_source()
        for module in SOURCES:
            self.write(module, "a note")

    # the folder

    def write_source(self):
        path = self.root / "source.jsonl"
        before = path.stat() if path.exists() else None
        path.write_text(self.source)
        if before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def write(self, module, note):
        numbers = [self.code[module, i] for i in range(len(DEFINITIONS.get(module, [])))]
        path = self.root / "tiny" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCES[module].format(*numbers, note=note))

    def project(self):
        prepare = PARAMS.prepare.model_copy(update={"source": str(self.root / "source.jsonl"), "format": "rows"})
        first = {"model": PARAMS.model, "prepare": prepare}
        graph = []
        for name, stage, own, inputs in GRAPH:
            sections = {each: self.params[f"{name}.{each}"] for each in own} if inputs else first
            graph.append(Node(name, stage, sections, inputs))
        modules = Modules(self.root / "tiny")
        return Project(self.root, "tiny", PARAMS, graph=graph, modules=modules)

    # the model

    def identity(self, name, values):
        """What a result is made of, as what a reason may name -> its state."""
        _, stage, own, inputs = next(row for row in GRAPH if row[0] == name)
        parts = {("param", each): self.params[f"{name}.{each}"] for each in own}
        parts |= {("input", argument): values[source] for argument, source in inputs.items()}
        if stage == "prepare":
            parts["input", "source"] = self.source
        for module, i in USED[stage]:
            parts["code", DEFINITIONS[module][i]] = self.code[module, i]
        return (stage, frozenset(parts.items()))

    def value(self, name, values):
        code, params = self.code, self.params
        if name == "read":
            return int(self.source) + code["stages/prepare", 0]
        if name in {"left", "right"}:
            return values["read"] * params[f"{name}.factor"] + code["maths", 1] + code["stages/scale", 0]
        if name == "join":
            total = values["left"] + values["right"] + code["maths", 0] + code["parts/__init__", 0]
            return total // 10 + code["stages/join", 0]
        return values["join"] * params["end.weight"] + code["parts/__init__", 0] + code["stages/end", 0]

    def expected_plan(self, forced):
        """Return action and possible sets of reasons by node, or None when a result that was changed is met."""
        values, planned, running = {}, {}, {}
        for name, _, _, inputs in GRAPH:
            if not set(inputs.values()) <= set(values):
                planned[name] = ("upstream", None)
                continue
            made_of = self.identity(name, values)
            if made_of in running and made_of not in self.made:
                planned[name] = ("upstream", None)
                continue
            if made_of in self.tampered:
                return None
            if made_of in self.made:
                values[name] = self.made[made_of][1]
            if name in forced:
                planned[name] = ("run", [{"forced"}])
            elif made_of in self.made:
                planned[name] = ("reuse", [set()])
            else:
                planned[name] = ("run", self.expected_reasons(name, made_of))
            if planned[name][0] == "run":
                running[made_of] = name
        return planned

    def expected_reasons(self, name, made_of):
        if made_of in self.ever:
            return [{"artifact missing"}]
        unreadable = {made_of for made_of, (path, _) in self.tampered.items() if path.name == "artifact.json"}
        known = [old for old, (maker, _) in self.made.items() if maker == name and old not in unreadable]
        if not known:
            return [{"never made here"}]
        told = [in_words(dict(old[1]), dict(made_of[1])) for old in known]
        return [reasons for reasons in told if len(reasons) == min(map(len, told))]

    def expected_run(self, forced):
        """Return the nodes that compute, making them in the model; None when a result that was changed is met."""
        values, ran = {}, []
        for name, *_ in GRAPH:
            made_of = self.identity(name, values)
            if made_of in self.tampered:
                return None
            if made_of not in self.made:
                self.made[made_of] = (name, self.value(name, values))
                self.ever.add(made_of)
                ran.append(name)
            elif name in forced:
                ran.append(name)
            values[name] = self.made[made_of][1]
        return ran, values


def in_words(old, new):
    reasons, code = set(), []
    for (kind, name), state in sorted(new.items(), key=lambda item: item[0]):
        before = old[kind, name]
        if before == state:
            continue
        if kind == "param":
            reasons.add(f"{name} {before} -> {state}")
        elif kind == "input":
            reasons.add(f"input {name} changed")
        else:
            code.append(name)
    return reasons | ({f"code: {', '.join(code)} changed"} if code else set())


def run(world, forced):
    """Do what the flow does, without Prefect: decide for node after node, and carry it out."""
    project, artifacts, ran = world.project(), {}, []
    wanted = chosen(Part(force=tuple(forced)), project.nodes)
    for node in project.nodes:
        digests = {name: made.digest for name, made in artifacts.items()}
        inputs = {argument: artifacts[name].path for argument, name in node.inputs.items()}

        def compute(staged, _, node=node, inputs=inputs):
            staged.mkdir(parents=True)
            (staged / HISTORY).write_text("")
            call(world.root, node, inputs, staged)

        artifacts[node.name], computed = carry_out(
            project,
            node,
            project.decide(node, digests, wanted),
            wanted,
            digests,
            compute,
            bring_back=lambda store, stage, key: None,
            recorded=lambda staged: nullcontext(),
            dataset={},
            input_keys={},
        )
        ran += [node.name] if computed else []
    values = {name: json.loads((made.path / "value.json").read_text()) for name, made in artifacts.items()}
    return ran, values


def call(root, node, inputs, out):
    """Call a stage as its sources are now."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny"]:
        del sys.modules[name]
    invalidate_caches()
    sys.path.insert(0, str(root))
    try:
        import_module(f"tiny.stages.{node.stage}").run(**node.sections, **inputs, out=out)
    finally:
        sys.path.remove(str(root))


# What may happen between two looks. Few values, so that going back to earlier ones is common.
numbers = st.sampled_from([0, 1, 8, 9])
edits = st.one_of(
    st.tuples(st.just("code"), st.sampled_from([(m, i) for m, names in DEFINITIONS.items() for i in range(len(names))]),
              numbers),
    st.tuples(st.just("note"), st.sampled_from(sorted(SOURCES)), st.sampled_from(["why", "another", "a note"])),
    st.tuples(st.just("param"), st.sampled_from(["left.factor", "right.factor", "end.weight"]), st.integers(1, 3)),
    st.tuples(st.just("data"), st.sampled_from(["11", "12", "20"]), st.none()),
    st.tuples(st.just("delete"), st.sampled_from(sorted(STAGES)), st.none()),
    st.tuples(st.just("tamper"), st.sampled_from(sorted(STAGES)), st.booleans()),
    st.tuples(st.just("heal"), st.booleans(), st.none()),
    st.tuples(st.just("revert"), st.integers(0, 5), st.none()),
    st.tuples(st.just("force"), st.sampled_from(sorted(STAGES)), st.none()),
)  # fmt: skip


def edit(world, kind, what, how):
    """Change the folder and the model; return the nodes that the next run is forced to compute."""
    if kind == "code":
        world.code[what] = how
        world.write(what[0], "a note")
    elif kind == "note":
        world.write(what, how)
    elif kind == "param":
        world.params[what] = how
    elif kind == "data":
        world.source = what
        world.write_source()
    elif kind == "delete":
        remove(world, what)
    elif kind == "tamper":
        tamper(world, what, how)
    elif kind == "heal":
        heal(world, what)
    elif kind == "revert" and world.snapshots:
        world.source, code, params = world.snapshots[what % len(world.snapshots)]
        world.code, world.params = {**code}, {**params}
        world.write_source()
        for module in SOURCES:
            world.write(module, "taken back")
    return {what} if kind == "force" else set()


def remove(world, name):
    """Remove the result that a node had in the last run."""
    made_of = world.folders.get(name)
    if made_of in world.made:
        shutil.rmtree(folder_of(world, made_of))
        del world.made[made_of]
        world.tampered.pop(made_of, None)


def tamper(world, name, in_manifest):
    """Change a byte of a result, keeping its size and its time of content."""
    made_of = world.folders.get(name)
    if made_of not in world.made or made_of in world.tampered:
        return
    path = folder_of(world, made_of) / ("artifact.json" if in_manifest else "value.json")
    sound, stat = path.read_bytes(), path.stat()
    bad = sound.replace(b'"key": "', b'"kex": "') if in_manifest else bytes([sound[0] ^ 1]) + sound[1:]
    path.write_bytes(bad)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    world.tampered[made_of] = (path, sound)


def heal(world, by_removing):
    for made_of, (path, sound) in [*world.tampered.items()]:
        if by_removing:
            shutil.rmtree(path.parent)
            del world.made[made_of]
        else:
            path.write_bytes(sound)
        del world.tampered[made_of]


def folder_of(world, made_of):
    return world.paths[made_of]


sequences = given(st.lists(st.tuples(edits, st.booleans()), min_size=1, max_size=6))
some = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@some
@sequences
def test_the_plan_is_what_a_run_does(sequence):
    edit_and_compare(sequence)


@pytest.mark.slow
@settings(some, max_examples=400)
@sequences
def test_the_plan_is_what_a_run_does_whatever_else_happens(sequence):
    edit_and_compare(sequence)


def edit_and_compare(sequence):
    """Make every edit, and compare plan and run with the model's after each."""
    with TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr("rrlhf.pipeline.store.sync", lambda path: None)  # the disk is not what this is about
        patch.setattr("rrlhf.pipeline.store.git_commit", lambda root: None)
        world = World(Path(folder))
        world.paths = {}
        look_and_run(world, set())
        for step, and_run in sequence:
            forced = edit(world, *step)
            if and_run or forced:
                look_and_run(world, forced)
            else:
                look(world, forced)
        heal(world, by_removing=True)
        look_and_run(world, set())
        assert {one.action for one in world.project().plan()} == {"reuse"}


def look(world, forced):
    """Compare the plan with the model's."""
    expected, part = world.expected_plan(forced), Part(force=tuple(forced))
    if expected is None:
        with pytest.raises(TamperedError):
            world.project().plan(part)
        return None
    planned = world.project().plan(part)
    for one in planned:
        action, reasons = expected[one.node]
        assert one.action == action, (one, expected)
        assert reasons is None or set(one.reasons) in reasons, (one, reasons)
    return {one.node: one.action for one in planned}


def look_and_run(world, forced):
    """Compare the plan and then the run with the model's, and the one with the other."""
    planned, expected = look(world, forced), world.expected_run(forced)
    if expected is None:
        with pytest.raises(TamperedError):
            run(world, forced)
        note_folders(world)
        return
    ran, values = run(world, forced)
    assert (ran, values) == expected  # no false hit: every value is what a run from nothing would give
    surely = {name for name, action in planned.items() if action == "run"}
    perhaps = {name for name, action in planned.items() if action == "upstream"}
    assert surely <= set(ran) <= surely | perhaps
    note_folders(world)
    world.snapshots.append((world.source, {**world.code}, {**world.params}))


def note_folders(world):
    """Remember where the results of the present settings lie."""
    project, digests, values = world.project(), {}, {}
    for node in project.nodes:
        made_of = world.identity(node.name, values) if set(node.inputs.values()) <= set(values) else None
        if made_of is None or made_of not in world.made:
            break
        path = project.store.folder(node.stage, key_digest(project.document(node, digests)))
        world.folders[node.name], world.paths[made_of] = made_of, path
        if made_of in world.tampered:
            break
        values[node.name] = world.made[made_of][1]
        digests[node.name] = json.loads((path / "artifact.json").read_text())["digest"]
