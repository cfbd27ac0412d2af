"""What a training run needs to go on after an interruption as if there had been none.

A checkpoint is a folder named by the steps done: `shared.safetensors` (weights and optimizer, equal in all
processes), `own-RANK.safetensors` and `own-RANK.json` of every process, and `checkpoint.json`, which lists the
sha256 of the others. It is written beside, synced and renamed, and only then is the older one removed, so a kill at
any moment leaves one that is whole.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rrlhf.files import sync
from rrlhf.locks import locked
from rrlhf.memo import sha256

MANIFEST = "checkpoint.json"
SHARED = "shared.safetensors"
PARTIAL = ".partial"
DOUBTFUL = "-doubtful"  # ends the name of one that was saved for being interrupted, not for being sound
WHOLE = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}  # every process holds all weights


class State(NamedTuple):
    """What a checkpoint holds, as seen by one process."""

    shared: dict[str, Tensor]  # equal in all processes
    own: dict[str, Tensor]  # of this process
    notes: dict[str, Any]  # of this process, as JSON


class Checkpoints:
    """The checkpoints of one run; a context, in which no other run writes into the same folder.

    Two stay: the newest, and the newest good one, to which a run can roll back. made_for: settings that a checkpoint
    must share to be used, as JSON; the number of processes is added. Where weights are spread over processes (FSDP,
    DeepSpeed) nothing is kept.
    """

    def __init__(self, folder: Path, engine: Accelerator, made_for: Mapping[str, Any]) -> None:
        self._folder, self._engine = folder, engine
        self._made_for = {**made_for, "processes": engine.num_processes}
        self._works = engine.distributed_type in WHOLE
        self._held = ExitStack()

    def __enter__(self) -> Checkpoints:
        if self._engine.is_main_process:  # a process whose parent was killed may still be ending its last step
            self._held.enter_context(locked(self._folder / ".lock"))
        self._engine.wait_for_everyone()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def save(self, done: int, state: State, good: bool = True) -> None:
        """Write the checkpoint after `done` steps in the place of older ones; all processes call it together."""
        if not self._works:
            return
        partial, rank = self._folder / PARTIAL, self._engine.process_index
        if self._engine.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_tensors(partial / SHARED, state.shared)
        self._engine.wait_for_everyone()
        _write_tensors(partial / f"own-{rank}.safetensors", state.own)
        _write_json(partial / f"own-{rank}.json", state.notes)
        self._engine.wait_for_everyone()
        if self._engine.is_main_process:
            self._publish(partial, done, good)

    def _publish(self, partial: Path, done: int, good: bool) -> None:
        files = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        _write_json(partial / MANIFEST, {"made_for": self._made_for, "files": files})
        sync(partial)
        final = self._folder / f"{done:08d}{'' if good else DOUBTFUL}"
        shutil.rmtree(final, ignore_errors=True)  # there only if it was not whole: else the run had gone on from it
        partial.rename(final)
        sync(self._folder)
        for path in set(self._saved()) - {final, *([] if good else self._saved(good=True)[-1:])}:
            shutil.rmtree(path)

    def newest(self, good: bool = False) -> State | None:
        """Return the last state that was saved whole and for these settings, or None; all processes find the same."""
        for folder in reversed(self._saved(good)):
            problem = self._problem(folder)
            if problem is None:
                return self._read(folder)
            if self._engine.is_main_process:
                print(f"checkpoint {folder.name} is not used: {problem}", file=sys.stderr, flush=True)
        return None

    def _saved(self, good: bool = False) -> list[Path]:
        """Return the folders of the checkpoints, or of the good ones, oldest first."""
        saved = sorted(path for path in self._folder.glob("[0-9]*") if path.is_dir())
        return [path for path in saved if not (good and path.name.endswith(DOUBTFUL))]

    def _problem(self, folder: Path) -> str | None:
        """Say why a checkpoint cannot be used."""
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            broken = [name for name, digest in manifest["files"].items() if sha256(folder / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            return f"it is not whole ({error})"
        if broken:
            return f"{broken[0]} was changed"
        made_for = manifest["made_for"]
        other = [name for name, value in self._made_for.items() if made_for.get(name) != value]
        return f"it was made with other settings ({', '.join(other)})" if other else None

    def _read(self, folder: Path) -> State:
        rank = self._engine.process_index
        notes = json.loads((folder / f"own-{rank}.json").read_bytes())
        return State(load_file(folder / SHARED), load_file(folder / f"own-{rank}.safetensors"), notes)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors by name; every value in it must be a tensor, as Adam's are."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": value for i, values in state.items() for name, value in values.items()}


def optimizer_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the optimizer's groups (learning rates, settings, numbers of parameters) as JSON."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Iterable[dict[str, Any]]
) -> None:
    """Put back what `optimizer_tensors` and `optimizer_groups` returned, in place."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith("optimizer."):
            _, i, name = path.split(".")
            state.setdefault(int(i), {})[name] = value
    tuples = [{name: tuple(v) if name == "betas" else v for name, v in group.items()} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": tuples})


class Trained(NamedTuple):
    """What optimizer steps change."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that train and the optimizer's state."""
        return self._weights() | optimizer_tensors(self.optimizer)

    def notes(self) -> dict[str, Any]:
        """Return what else there is to know, as JSON."""
        return {"groups": optimizer_groups(self.optimizer), "schedule": self.schedule.state_dict()}

    @torch.no_grad()
    def put_back(self, state: State) -> None:
        """Put back what `tensors` and `notes` returned, in place."""
        for name, weight in self._weights().items():
            weight.copy_(state.shared[name])
        load_optimizer(self.optimizer, state.shared, state.notes["groups"])
        self.schedule.load_state_dict(state.notes["schedule"])

    def _weights(self) -> dict[str, Tensor]:
        return {f"weights.{name}": weight for name, weight in self.module.named_parameters() if weight.requires_grad}


def random_states(**generators: torch.Generator) -> dict[str, Tensor]:
    """Return the states of the generators and of torch's own."""
    own = {name: generator.get_state() for name, generator in generators.items()}
    own["torch"] = torch.get_rng_state()
    return own | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_states(states: Mapping[str, Tensor], **generators: torch.Generator) -> None:
    """Put back what `random_states` returned, in place."""
    for name, generator in generators.items():
        generator.set_state(states[name])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
    sync(path)
