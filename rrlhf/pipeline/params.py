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
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError

from rrlhf.checks import contradictions
from rrlhf.config import Params
from rrlhf.located import ParamsError, Where, did_you_mean, parse, place, read
from rrlhf.pipeline.keys import leaves
from rrlhf.redact import redacted
from rrlhf.types import Json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

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
        for key in reversed(path):
            value = {key: value}
        merged = _merge(merged, value)
        for depth in range(1, len(path)):
            where.setdefault(path[:depth], f"--set {dotted}")  # a section that there is not
        where[path] = f"--set {dotted}"
    _complete_arms(merged)
    mistakes += [
        _told(path, "it holds a password or a key, which every result would keep: give it by the environment", where)
        for path, value in leaves(merged)
        if isinstance(value, str) and redacted(value) != value
    ]
    try:
        params = Params.model_validate(merged)
    except ValidationError as error:
        mistakes += [_explain(detail, merged, where) for detail in error.errors()]
        raise ParamsError("\n".join(mistakes)) from None
    mistakes += [_told(tuple(name.split(".")), text, where) for name, text in contradictions(params)]
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return params


def parse_override(text: str) -> tuple[str, Json]:
    """Split `section.key=value`; the value is read as YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise ParamsError(f"--set {text}: expected section.key=value, for example ppo.kl_weight=0.05")
    try:
        return dotted.strip(), parse(value, "")[1]
    except ParamsError:
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


def _complete_arms(merged: dict[str, Any]) -> None:
    """Leave out arms and settings of arms that are null, and give each arm a seed, in place."""
    arms = merged.get("arms")
    if not isinstance(arms, dict):
        return
    seed = {"seed": merged["seed"]} if "seed" in merged else {}
    for name, arm in arms.items():
        if isinstance(arm, dict):
            arms[name] = seed | {setting: value for setting, value in arm.items() if value is not None}
    merged["arms"] = {name: arm for name, arm in arms.items() if arm is not None}


def _explain(detail: ErrorDetails, merged: Mapping[str, Any], where: Where) -> str:
    """Say what a setting that pydantic refused should be."""
    kind, value, context, loc = detail["type"], detail["input"], detail.get("ctx", {}), detail["loc"]
    if kind.startswith("union_tag"):  # it lacks what its class is chosen by: a method, a reward or a kind
        loc = (*loc, context["discriminator"].strip("'()"))
    path, tags = _path(loc, merged)
    of = f" (for {', '.join(tags)})" if tags else ""
    if kind == "extra_forbidden":
        known = _fields(Params, path[:-1])
        elsewhere = path[-1] in known
        text = (
            f"not a setting{of}: leave it out, or null"
            if elsewhere
            else f"unknown setting{did_you_mean(path[-1], known)}"
        )
    elif kind in {"missing", "union_tag_not_found"}:
        text = f"is missing{of}"
        if len(path) == 2:  # of a section, not of an arm
            text += "; `rrlhf init` in an empty folder writes a params.yaml with all that this version asks for"
    elif kind == "union_tag_invalid":
        known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        text = f"there is no {context['tag']!r}{did_you_mean(context['tag'], known)}"
    else:
        said = detail["msg"].removeprefix("Value error, ")
        text = f"{said[0].lower()}{said[1:]}, found {redacted(repr(value))}{of}"
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
            text += f" (text to YAML; write {value.replace('e', '.0e')})"
    return _told(path, text, where)


def _path(loc: tuple[int | str, ...], merged: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Return the path of a setting as it is written, and the members of unions that pydantic names on the way."""
    path: list[str] = []
    tags: list[str] = []
    level: Any = merged
    *above, last = (str(part) for part in loc if part != "[key]")
    for part in above:
        inside = level[int(part)] if isinstance(level, list) else level.get(part)
        if isinstance(inside, dict | list):
            path.append(part)
            level = inside
        else:
            tags.append(part)
    return (*path, last), tags


def _told(path: tuple[str, ...], text: str, where: Where) -> str:
    at, name = place(path, where), ".".join(path)
    return f"{at}: {text}" if at == f"--set {name}" else f"{at}: {name}: {text}"


def _fields(annotation: Any, path: tuple[str, ...]) -> list[str]:
    """Return the names that settings may have at a path: those of a section, or of any member of a union."""
    fields: dict[str, FieldInfo] | None = getattr(annotation, "model_fields", None)
    if fields is None:
        return list(dict.fromkeys(name for each in get_args(annotation) for name in _fields(each, path)))
    if not path:
        return list(fields)
    return _fields(fields[path[0]].annotation if path[0] in fields else annotation, path[1:])
