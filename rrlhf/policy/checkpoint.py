"""What a training run needs to go on after an interruption as if there had been none.

A checkpoint is a folder named by the steps done: `shared.pt` (whole weights and optimizer),
`own-RANK.pt` of every process, and `checkpoint.json`, which lists the sha256 of the others. It is written beside,
synced and renamed, and only then is the older one removed, so a kill at any moment leaves one that is whole.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - what torch raises where it would have to run something
from shlex import quote
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from rrlhf.config import Section
from rrlhf.files import CHECKPOINT, sync
from rrlhf.located import MendableError
from rrlhf.memo import sha256

MANIFEST = "checkpoint.json"
SHARED = "shared.pt"
PARTIAL = ".partial"
DOUBTFUL = "-doubtful"  # ends the name of one that was saved for being interrupted, not for being sound


class State(NamedTuple):
    """What a checkpoint holds, as seen by one process: tensors, numbers, text, and lists and dictionaries of them."""

    shared: dict[str, Any]  # equal in all processes
    own: dict[str, Any]  # of this process
    owns: Sequence[dict[str, Any]] = ()  # once it is read, of all processes for which this one goes on


class PlantedError(MendableError):
    """A checkpoint asks for code to be run."""

    exit_code = 3


class Checkpoints:
    """The checkpoints of a run in its folder `out`.

    Two stay: the newest, and the newest good one, to which a run can roll back. made_for: settings that a checkpoint
    must share to be used; the number of processes, and how weights are spread over them, may be another.
    """

    def __init__(self, out: Path, engine: Accelerator, **made_for: Section | int) -> None:
        self._folder, self._engine = out / CHECKPOINT, engine
        self._made_for = {
            name: each.model_dump() if isinstance(each, Section) else each for name, each in made_for.items()
        }

    def save(self, done: int, state: State, good: bool = True) -> None:
        """Write the checkpoint after `done` steps in the place of older ones; all processes call it together."""
        partial, rank = self._folder / PARTIAL, self._engine.process_index
        if self._engine.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial / SHARED, state.shared)
        self._engine.wait_for_everyone()
        _write(partial / f"own-{rank}.pt", state.own)
        self._engine.wait_for_everyone()
        if self._engine.is_main_process:
            self._publish(partial, done, good)

    def _publish(self, partial: Path, done: int, good: bool) -> None:
        files = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"made_for": self._made_for, "files": files}), encoding="utf-8")
        sync(partial / MANIFEST)
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
            there = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
            broken = sorted(name for name, _ in there.items() ^ manifest["files"].items())
            other = [name for name, value in self._made_for.items() if manifest["made_for"].get(name) != value]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return f"it is not whole ({error})"
        if broken:
            return f"{broken[0]} was changed"
        return f"it was made with other settings ({', '.join(other)})" if other else None

    def _read(self, folder: Path) -> State:
        """Read a checkpoint; of fewer processes each goes on for several, more have some that go on for none."""
        rank, processes = self._engine.process_index, self._engine.num_processes
        saved = len([*folder.glob("own-*.pt")])
        owns = {
            number: _loaded(folder / f"own-{number}.pt") for number in {rank % saved, *range(rank, saved, processes)}
        }
        return State(
            _loaded(folder / SHARED), owns[rank % saved], [owns[each] for each in range(rank, saved, processes)]
        )


def _loaded(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise PlantedError(
            f"{path} holds more than tensors, numbers and texts, which no run saves, and nothing of it was run\n"
            f"to go on from an earlier one, or from the start: rm -r {quote(str(path.parent))}"
        ) from None
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    torch.save(content, path)
    sync(path)
