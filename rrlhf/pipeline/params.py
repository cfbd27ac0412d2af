"""params.yaml and profiles/, parsed once into the sections of rrlhf/config.py; every mistake is reported at once.

The default profile is params.yaml alone. Another profile is a file in profiles/ that states only its differences;
overrides come last. Mappings merge; null removes an arm. An arm without a seed has that of the run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from pydantic import ValidationError

from rrlhf.checks import contradictions
from rrlhf.config import Arm, Params
from rrlhf.located import ParamsError, Where, did_you_mean, place, read
from rrlhf.types import Json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")  # it stands in commands of dvc.yaml, file names and addresses
LONGEST_NAME = 200  # letters of a run's name; the settings themselves are kept with the run


def profiles(root: Path) -> list[str]:
    """Names of the profiles that there are; `load_params` refuses one that nothing could be called."""
    return ["default", *sorted(path.stem for path in (root / "profiles").glob("[!.]*.yaml") if path.is_file())]


def load_params(root: Path, profile: str = "default", overrides: Mapping[str, Json] | None = None) -> Params:
    """Read a profile and apply overrides, whose keys are dotted ("ppo.kl_weight").

    Raises ParamsError with all mistakes at once.
    """
    if profile not in profiles(root):
        raise ParamsError(f"unknown profile {profile!r}{did_you_mean(profile, profiles(root))}")
    file = Path("profiles", f"{profile}.yaml")
    if (root / file).exists() and (profile == "default" or not NAME.fullmatch(profile)):
        raise ParamsError(
            f"{file}: rename it: the name of a profile is up to 40 letters (a to z), digits, - and _, begins with a "
            f"letter or digit, and is not default"
        )
    where: Where = {}
    mistakes: list[str] = []
    merged = read(root / "params.yaml", where, mistakes)
    if profile != "default":
        merged = _merge(merged, read(root / file, where, mistakes))
    for dotted, value in (overrides or {}).items():
        path = tuple(dotted.split("."))
        merged = _merge(merged, _nested(path, value))
        for depth in range(1, len(path)):
            where.setdefault(path[:depth], f"--set {dotted}")  # a section that there is not
        where[path] = f"--set {dotted}"
    arms = merged.get("arms")
    if isinstance(arms, dict):
        seed = {"seed": merged["seed"]} if "seed" in merged else {}
        merged["arms"] = {
            name: seed | arm if isinstance(arm, dict) else arm for name, arm in arms.items() if arm is not None
        }
    try:
        params = Params.model_validate(merged)
    except ValidationError as error:
        mistakes += [_explain(detail, where) for detail in error.errors()]
        raise ParamsError("\n".join(mistakes)) from None
    mistakes += [f"{place(path, where)}: {text}" for path, text in contradictions(params)]
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return params


def parse_override(text: str) -> tuple[str, Json]:
    """Split `section.key=value`; the value is read as YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise ParamsError(f"--set {text}: expected section.key=value, for example ppo.kl_weight=0.05")
    try:
        return dotted.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ParamsError(f"--set {text}: the value is not valid YAML") from None


def option(dotted: str, value: Json) -> str:
    """Return the --set that `parse_override` reads as this, quoted for a shell."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    plain = text.removesuffix("\n").removesuffix("\n...")  # which ends a document that is one word
    return f"--set {quote(f'{dotted}={plain}')}"


def run_name(profile: str, overrides: Mapping[str, Json] | None = None) -> str:
    """Return what a run is called where many are listed: "tiny · ppo.kl_weight=0.05"."""
    told = (
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in (overrides or {}).items()
    )
    return " · ".join([profile, *told])[:LONGEST_NAME]


def _merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: _merge(under.get(key), value) for key, value in over.items()}


def _nested(path: tuple[str, ...], value: Json) -> Json:
    for key in reversed(path):
        value = {key: value}
    return value


def _explain(detail: Any, where: Where) -> str:
    path = tuple(str(part) for part in detail["loc"])
    at, name, value = place(path, where), ".".join(path), detail["input"]
    if detail["type"] == "extra_forbidden":
        text = f"{name}: unknown setting{did_you_mean(path[-1], _fields(path[:-1]))}"
    elif detail["type"] == "missing":
        text = f"{name} is missing"
    else:
        text = f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}, found {value!r}"
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
            mantissa, exponent = value.split("e")
            text += f" (text to YAML; write {mantissa}.0e{exponent})"
    return f"{at}: {text.removeprefix(f'{name}: ') if at == f'--set {name}' else text}"


def _fields(path: tuple[str, ...]) -> list[str]:
    model: Any = Params
    for part in path:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        model = Arm if path[0] == "arms" else annotation
    return list(getattr(model, "model_fields", {}))
