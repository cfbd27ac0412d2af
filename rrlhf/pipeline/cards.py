"""Model cards: what a reader who meets a model's folder, here or in the registry, has to know before using it.

A card follows from the artifact's manifest and its logged rows alone, so the same artifact has the same card. It starts
with the YAML block by which the Hugging Face hub sorts models (huggingface.co/docs/hub/model-cards).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rrlhf.config import REWARD_SETTINGS, Prepare
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.stages import arm_of, cut_shares, model_name, spec_of, unit
from rrlhf.policy.health import in_words
from rrlhf.redact import visible
from rrlhf.types import SUMMARY, Dataset, Metrics

CLOCKS = ("step", "seconds")


def card(manifest: Mapping[str, Any], rows: Sequence[Metrics]) -> str | None:
    """Return the README.md of a model's artifact; None for a stage that makes no model.

    manifest: of the artifact, before its files are listed; rows: all that the stage logged.
    """
    stage, params, inputs = (manifest["document"][name] for name in ("stage", "params", "inputs"))
    spec, metrics = spec_of(stage), last_values(rows)
    if not spec.model:
        return None
    settings = yaml.safe_dump(params, sort_keys=False, allow_unicode=True).rstrip()
    return filled(
        "card.md.j2",
        manifest=manifest,
        stage=stage,
        short=manifest["key"][:12],
        front_matter=_front_matter(manifest),
        title=title(manifest),
        what=what(manifest),
        spec=spec,
        registered=f"models:/{model_name(stage, manifest.get('profile', 'default'))}/VERSION",  # the number comes later
        data=_data(manifest),
        base=_base(manifest).get("base"),
        parents={name: digest for name, digest in inputs.items() if name != DATA},
        metrics={name: value for name, value in metrics.items() if name not in CLOCKS},
        unit=unit,
        cut=cut_in_words(metrics),
        health=in_words(rows) if "health" in params else "no detector watched it",
        made_with={**manifest["document"].get("numerics", {}), **manifest.get("hardware", {})},
        settings=settings,
        fence="`" * max(3, *(1 + len(ticks) for ticks in ["", *re.findall("`+", settings)])),
    )


def filled(template: str, **content: object) -> str:
    """Fill a template of this package with texts made visible: in HTML they are escaped, in Markdown `code` does it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here: a plan does not wait for it

    environment = Environment(
        loader=PackageLoader("rrlhf"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["code"] = code
    return environment.get_template(template).render(**content)


def about(dataset: Dataset, prepare: Prepare) -> dict[str, str]:
    """Return what a card tells of a data set; `hub` where its source is on the Hugging Face hub."""
    told = {"name": dataset.name, "digest": dataset.digest, "limit": str(prepare.limit or "")}
    summary = dataset.path / SUMMARY
    rejected = json.loads(summary.read_bytes()).get("rejected", {}) if summary.is_file() else {}
    told["left_out"] = ", ".join(f"{count} {rule}" for rule, count in rejected.items())
    if prepare.revision:
        part = "".join(f", {name} {value}" for name in ("config", "split") if (value := getattr(prepare, name)))
        return told | {"source": f"{prepare.source}@{prepare.revision}{part}", "hub": prepare.source}
    if prepare.source == "written":
        return told | {"source": "tasks of rrlhf/data/tasks.py"}
    return told | {"source": Path(prepare.source).name}  # of a file, not where this machine has it


def title(manifest: Mapping[str, Any]) -> str:
    """Return what a model is, in a few words: "Policy robust, by PPO"."""
    name = manifest["name"]
    return spec_of(manifest["document"]["stage"]).title.format(name=name, arm=arm_of(name) or name)


def what(manifest: Mapping[str, Any]) -> str:
    """Return how a model was made, in a sentence or two."""
    params = manifest["document"]["params"]
    arm, ensemble = params.get("arm", {}), params.get("ensemble", {})
    return spec_of(manifest["document"]["stage"]).about.format(
        heads=ensemble.get("heads", 0) + len(ensemble.get("models", ())),
        kind=ensemble.get("kind", "heads"),
        loss=params.get("dpo", {}).get("loss", "sigmoid"),
        n=arm.get("n", 1),
        samples=params.get("best_of_n", {}).get("samples") or arm.get("n", 1),
        reward=_reward(arm),
    )


def without_front_matter(text: str) -> str:
    """Return a card for a page that does not read its YAML block."""
    return re.sub(r"\A---\n.*?\n---\n+", "", text, flags=re.DOTALL)


def last_values(rows: Iterable[Metrics]) -> Metrics:
    """Return the last value of every metric."""
    last: Metrics = {}
    for row in rows:
        last |= row
    return last


def cut_in_words(metrics: Metrics) -> str:
    """Say how much of each kind of text a stage cut to its token limits: "2.1 % of prompts"; nothing for none."""
    return ", ".join(f"{100 * share:.1f} % of {kind}" for kind, share in cut_shares(metrics).items() if share)


def code(value: object) -> str:
    """Return a text as code in Markdown: on one line, with nothing in it that ends the code or a table's cell."""
    return f"`{' '.join(str(value).replace('`', chr(39)).replace('|', '/').split())}`"


def _front_matter(manifest: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    stage, data, base = manifest["document"]["stage"], _data(manifest), _base(manifest)
    spec, data_name = spec_of(stage), data["hub"] or data["name"]
    is_hub_id = base.get("revision") and re.fullmatch(r"[\w.-]+/[\w.-]+", base["base"])
    known = ModelCardData(
        library_name="transformers" if spec.makes == "language model" else "rrlhf",
        pipeline_tag="text-classification" if spec.makes == "reward model" else "text-generation",
        base_model=base["base"] if is_hub_id else None,
        datasets=[data_name] if data_name else None,
        tags=["rlhf", spec.tag, f"rrlhf-{stage.replace('_', '-')}"],
    )
    return str(known.to_yaml()).strip()


def _base(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that name the language model below: of a reward model, its trunk's own where it has one."""
    params = manifest["document"]["params"]
    own: Mapping[str, Any] = params.get("given") or params.get("trunk") or params.get("reward") or {}
    shared: Mapping[str, Any] = params.get("model", {})
    return own if own.get("base") else shared


def _reward(arm: Mapping[str, Any]) -> str:
    """Name an arm's reward with its settings and functions."""
    given = "".join(f", {name} {arm[name]:g}" for name in REWARD_SETTINGS if arm.get(name) is not None)
    functions = "".join(f", {weight:+g} {path}" for path, weight in sorted(arm.get("functions", {}).items()))
    return code(f"{arm.get('reward')}{given}{functions}")


def _data(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the data set: its names, where it is from, its version, and if the stage read it."""
    read = manifest["document"]["inputs"].get(DATA)
    unknown = dict.fromkeys(("name", "source", "hub", "digest", "limit", "left_out"))
    known: dict[str, Any] = unknown | manifest.get("dataset", {})
    return known | {"version": read or known["digest"], "read": read is not None}
