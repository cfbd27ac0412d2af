"""`rrlhf plan --memory`: what every stage takes of memory, and which setting would make the most of that less."""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from rrlhf.config import Launch, Params
from rrlhf.hardware import device_kind, dtype_name
from rrlhf.located import ParamsError
from rrlhf.pipeline.memory import Moment, moments
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.types import Json

PARTS = Moment._fields[1:]
AT_ONCE = {  # the setting of each stage that says how much of it runs at once
    "sft": ("sft", "microbatch_size"),
    "reward": ("reward", "batch_size"),
    "member": ("reward", "batch_size"),
    "ensemble": ("reward", "batch_size"),
    "ppo": ("ppo", "microbatch_tokens"),
    "dpo": ("dpo", "microbatch_size"),
    "evaluate": ("evaluate", "batch_size"),
}


def by_node(project: Project) -> dict[str, list[Moment]]:
    """Return the moments of every node that is looked at; the nodes of one stage have the same."""
    by_stage = {stage: moments(stage, project.params) for stage in dict.fromkeys(node.stage for node in project.nodes)}
    return {node.name: by_stage[node.stage] for node in project.nodes if by_stage[node.stage]}


def cheaper(project: Project, stage: str, overrides: Mapping[str, Json]) -> Iterator[tuple[str, int]]:
    """Yield settings, written as for --set, with the peak that a stage has with them, where that is lower."""
    before = peak(moments(stage, project.params)).total
    for setting, value in _changes(stage, project.params):
        with suppress(ParamsError):  # another setting speaks against it
            params = load_params(project.root, project.profile, {**overrides, setting: value})
            if (after := peak(moments(stage, params)).total) < before:
                yield f"{setting}={str(value).lower()}", after


def peak(found: list[Moment]) -> Moment:
    """Return the moment at which there is the most."""
    return max(found, key=lambda moment: moment.total)


def largest(found: Mapping[str, list[Moment]]) -> str:
    """Return the node that needs the most."""
    return max(found, key=lambda name: peak(found[name]).total)


def as_json(found: Mapping[str, list[Moment]], less: Mapping[str, int]) -> Json:
    """Return it for scripts, in bytes."""
    told: dict[str, Json] = {
        name: {"peak": peak(some).total, "moments": [each._asdict() for each in some]} for name, some in found.items()
    }
    return {"nodes": told, "cheaper": {**less}}


def lines(found: Mapping[str, list[Moment]], less: Mapping[str, int], launch: Launch) -> Iterator[str]:
    """Yield a table, a row a node, of each part where it is largest, and what would make the most of it less."""
    width = max(len(name) for name in found)
    yield f"{'GiB per process':{width}}  " + "".join(f"{part:>12}" for part in (*PARTS, "peak")) + "  while"
    for name, some in found.items():
        parts = [max(getattr(each, part) for each in some) for part in PARTS]
        numbers = "".join(f"{_gib(size):>12}" for size in (*parts, peak(some).total))
        yield f"{name:{width}}  {numbers}  {peak(some).when}"
    most = largest(found)
    told = f"{most} needs the most, {_gib(peak(found[most]).total)} GiB"
    if less:
        told += "; with " + ", with ".join(f"{setting} {_gib(size)}" for setting, size in less.items())
    yield told
    if launch.arms_at_once > 1:
        yield f"launch.arms_at_once {launch.arms_at_once}: as many arms train at the same time, each in a process"


def _changes(stage: str, params: Params) -> Iterator[tuple[str, Json]]:
    """Yield settings that may lower what a stage needs."""
    model, (section, setting) = params.model, AT_ONCE[stage]
    at_once = getattr(getattr(params, section), setting)
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing", True
    if dtype_name(model.dtype, device_kind(model.device)) != "bfloat16":
        yield "model.dtype", "bfloat16"
    if at_once > 1:
        yield f"{section}.{setting}", at_once // 2
    if stage == "ppo" and params.ppo.trains != "lora":
        yield "ppo.trains", "lora"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**30 else f"{size / 2**30:.3f}"
