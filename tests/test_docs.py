"""docs/metrics.md names every number that a stage logs, every detector and every dial of theirs, and no other."""

import math
import re
from pathlib import Path

import pytest
from conftest import save_random_heads

from rrlhf.config import ChatJudge, Gold, Health
from rrlhf.data.tables import write_tables
from rrlhf.judging.evaluation import OwnJudge
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_document
from rrlhf.pipeline.launch import call
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.stages import CUT
from rrlhf.policy.health import DIVERGED, MARK, WINDOW, findings, hacking_suspected
from rrlhf.robust import READINGS
from rrlhf.tools.reporting.comparison import METRICS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
TABLE = re.compile(r"^\| (\w[^|]*) \|[^\n]*\n\|(?:---\|)+\n((?:\|[^\n]*\n)+)", re.MULTILINE)
POLICIES = {
    "gae": {},
    "reinforce": {"ppo.estimator": "reinforce++", "ppo.kl_in": "loss", "ppo.kl_estimator": "k2"},
    "rloo": {"ppo.estimator": "rloo", "ppo.responses_per_prompt": 2, "ppo.kl_target": 1.0},
    "grpo": {"ppo.estimator": "grpo", "ppo.responses_per_prompt": 2, "ppo.max_kl": 1000.0},
    "full": {"ppo.trains": "full"},
    "lora": {"ppo.trains": "lora"},
    "function": {"arms.robust.functions": {"rules_of_the_glossary:short": 0.1}},
}
TRUNK = {"reward.layer": 2, "reward.train_layers": 1, "reward.trunk": "full"}
REWARDS = [{}, TRUNK, {"ensemble.kind": "members"}, TRUNK | {"ensemble.kind": "lora", "ensemble.diversity": 0.01}]


def section(title):
    """The part of the text under a heading of the second level."""
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def named(title, header="name"):
    """The names in the first column of a section's tables."""
    tables = [rows for head, rows in TABLE.findall(section(title) + "\n") if head == header]
    firsts = [row.split("|")[1] for rows in tables for row in rows.splitlines()]
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def general(name):
    """A metric's name as the glossary writes it."""
    name = re.sub(r"^head_\d+", "head_N", name)
    return re.sub(f"^({MARK}|function_).*", r"\1NAME", name)


@pytest.fixture(scope="module")
def inputs(start):
    """Folders of a random model, data, and random reward heads on the model's first layer."""
    folders = {name: start / name for name in ("data", "sft", "reward", "ensemble")}
    for name, heads in (("reward", 1), ("ensemble", 3)):
        save_random_heads(folders[name], heads)
    return folders


def logged(node, folders, out):
    """Run a stage and return the names of all that it logged."""
    rows = []
    out.mkdir()
    given = {argument: folders[name] for argument, name in node.inputs.items()}
    call(key_document(node, {}), inputs=given, out=out, log=rows.append)
    names = {name for row in rows for name in row} - {"step"}
    assert names & named("What was cut") or node.stage in {"member", "ensemble"}
    return names - named("What was cut")


def test_the_glossary_names_what_ppo_logs_and_no_other(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_of_the_glossary.py").write_text("def short(completions, **_): return [-1.0] * len(completions)")
    found = {f"{MARK}NAME", DIVERGED}  # tests/policy/test_health.py provokes these
    for name, options in POLICIES.items():
        params = load_params(ROOT, "tiny", {"ppo.updates": 1, "arms.single": None, **options})
        node = next(node for node in nodes(params) if node.name == "ppo-robust")
        found |= {general(metric) for metric in logged(node, inputs, tmp_path / name)}
    assert named("ppo") == found


@pytest.fixture(scope="module")
def rewarded(start, tmp_path_factory):
    """All that the reward models' stages log, by every way to train them."""
    found = set()
    for number, options in enumerate(REWARDS):
        root, folders = tmp_path_factory.mktemp(f"rewards-{number}"), {name: start / name for name in ("data", "sft")}
        params = load_params(ROOT, "tiny", {"reward.epochs": 2, "ensemble.epochs": 2, "ensemble.heads": 2, **options})
        for node in nodes(params):
            if node.stage in {"reward", "member", "ensemble"}:
                found |= logged(node, folders, root / node.name)
                folders[node.name] = root / node.name
    return found


def test_the_glossary_names_what_reward_models_log_and_no_other(rewarded):
    described = {
        name.replace("READING", reading) for name in named("reward, ensemble and its members") for reading in READINGS
    }
    assert described - {"heldout_temperature"} == rewarded - {"heldout_temperature"}  # often not determined


def test_the_glossary_names_what_sft_logs_and_no_other(start, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    said = {"prompt": [{"role": "user", "content": "Say a."}], "response": "aeiou"}
    write_tables(data, [("sft", said)] * 4)
    node = next(node for node in nodes(load_params(ROOT, "tiny")) if node.name == "sft")
    assert logged(node, {"data": data}, tmp_path / "sft") == named("sft")


@pytest.mark.parametrize("method", ["dpo", "best_of_n"])
def test_the_glossary_names_what_other_methods_log_and_no_other(inputs, tmp_path, method):
    reward = {"reward": "single", "n": 2} if method == "best_of_n" else {}
    params = load_params(ROOT, "tiny", {"arms.other": {"method": method, "seed": 1, **reward}})
    node = next(node for node in nodes(params) if node.name == f"{method}-other")
    assert logged(node, inputs, tmp_path / "out") == named(method)


def test_the_glossary_names_all_that_is_cut():
    assert named("What was cut") == {*CUT}


def test_the_glossary_names_what_the_evaluation_measures():
    assert {name.removeprefix("POLICY_") for name in named("evaluate")} == {*METRICS, "function_NAME"}


def test_what_a_judge_costs_and_how_it_is_set_are_described():
    assert named("evaluate", "cost") == {*OwnJudge("", requests=0).costs}
    assert named("evaluate", "setting") == {*ChatJudge.model_fields}
    for name, field in ChatJudge.model_fields.items():
        default = "–" if field.is_required() else str(field.default)
        row = next(row for row in section("evaluate").splitlines() if row.startswith(f"| `{name}` |"))
        told = row.split("|")[2].strip().strip('`"').replace("temperature:", "'temperature':")
        assert told in {default, default.removeprefix("0")}


def test_every_part_of_gold_is_described_and_no_other():
    assert named("evaluate", "part") == {*Gold.model_fields}


def test_every_detector_is_described_and_no_other():
    good = {"score": 0.0, "score_std": 1.0, "kl": 0.0, "response_tokens": 9.0, "entropy": 2.0, "finished": 1.0}
    good |= {"sigma": 0.3, "repetition": 0.0}
    health = load_params(ROOT).health
    bad = good | {"kl": 1e6, "entropy": 0.0, "finished": 0.0, "score_std": 0.0, "sigma": math.nan}
    found = {finding.name for finding in findings([bad] * health.patience, good, health)}
    hacked = [good] * WINDOW + [good | {"score": 9.0, "sigma": 0.9}] * WINDOW
    assert named("Detectors", "detector") == found | {hacking_suspected(hacked).name}


def test_every_dial_of_health_is_described_and_no_other():
    assert named("Detectors", "dial") == {f"health.{name}" for name in Health.model_fields}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_every_link_leads_to_a_file(link):
    assert (ROOT / "docs" / link).exists()


def test_every_setting_that_is_named_exists():
    params = load_params(ROOT).model_dump()
    named_settings = set(re.findall(r"`(sft|reward|ensemble|ppo|dpo|health)\.(\w+)`", TEXT)) - {("health", "json")}
    assert named_settings
    assert all(key in params[part] for part, key in named_settings)


@pytest.mark.parametrize("page", ["docs/ppo.md", "docs/models.md", "docs/faults.md", "SECURITY.md"])
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text()))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 14
    assert named <= there
