"""The data, reward, ensemble and evaluation stages on a tiny random model, as plain functions."""

import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from chat_server import chat_server, longer
from classifiers import QWEN, saved
from conftest import prompts

from rrlhf.config import ChatJudge, Given, typed_arm
from rrlhf.data.fingerprints import row_hash
from rrlhf.data.tables import SCHEMAS, columns_of, preferences, read_table
from rrlhf.data.tasks import WritingTask
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import OwnJudge, read_evaluation
from rrlhf.models.load import load_base, save_model
from rrlhf.pipeline.params import load_params
from rrlhf.policy.reward import read_arm, write_arm
from rrlhf.rewards.features import PairFeatures
from rrlhf.rewards.heads import RewardHeads
from rrlhf.robust import Scores
from rrlhf.stages import ensemble, evaluate, ppo, prepare, reward, sft
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.tools.reporting.report import render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def params():
    return load_params(ROOT, "tiny")


@pytest.fixture(scope="module")
def made(params, tmp_path_factory):
    """Folder of every stage's result, by node name."""
    root = tmp_path_factory.mktemp("stages")
    rows = {}

    def run(name, stage, **arguments):
        folder = root / name
        folder.mkdir()
        rows[name] = []
        stage.run(**arguments, out=folder, log=rows[name].append)
        return folder

    common = {"model": params.model, "seed": params.seed}
    data = run("data", prepare, **common, prepare=params.prepare, gold=params.gold)
    start = run("sft", sft, **common, sft=params.sft, data=data)
    single = run("reward", reward, **common, reward=params.reward, data=data, sft=start)
    several = run("ensemble", ensemble, **common, ensemble=params.ensemble, reward=single)
    inputs = {"data": data, "sft": start, "reward": single, "ensemble": several}
    policies = {
        name: run(name, ppo, model=params.model, ppo=params.ppo, health=params.health, arm=arm, **inputs)
        for name, arm in params.arms.items()
        if arm.method == "ppo"
    }
    with pytest.MonkeyPatch.context() as patch, chat_server(longer) as (address, _):
        patch.chdir(root)
        judge = ChatJudge(address=address, name="gpt-x", key_variable=None)
        settings = params.evaluate.model_copy(update={"judge": judge})
        run("evaluate", evaluate, **common, gold=params.gold, evaluate=settings, **inputs, policies=policies)
    return root, rows


def test_splits_share_no_prompt(made):
    data = made[0] / "data"
    asked = [{json.dumps(row["prompt"]) for row in read_table(data, name)} for name in SCHEMAS]
    assert all(asked)
    assert sum(map(len, asked)) == len(set().union(*asked))


def test_training_labels_are_flipped_at_the_stated_rate_and_held_out_labels_never(made, params):
    data = made[0] / "data"
    training = [row["flipped"] for row in read_table(data, "preferences")]
    assert abs(sum(training) / len(training) - params.prepare.flip_rate) < 4 * (0.25 * 0.75 / len(training)) ** 0.5
    assert not any(row["flipped"] for row in read_table(data, "heldout"))


def test_a_demonstration_is_the_best_complete_answer_that_is_not_too_long():
    task = WritingTask("cheer", "honey", "Write one cheerful sentence about honey.")
    said = [("Good.", True, 5, 3.0), ("Cut off", False, 9, 4.0), ("Poor.", True, 4, 1.0), ("", True, 1, 9.0)]
    answers = [prepare.Answer(*answer) for answer in said]
    imitated = [[row["response"] for row in prepare._demonstration(task, answers, longest)] for longest in (3, 4, 5)]
    assert imitated == [[], ["Poor."], ["Good."]]


def test_no_pair_has_equal_or_empty_responses(made):
    for table in ("preferences", "heldout"):
        for pair in preferences(made[0] / "data", table):
            assert pair.chosen != pair.rejected
            assert pair.chosen
            assert pair.rejected


def test_preparing_again_gives_the_same_bytes(made, params, tmp_path):
    prepare.run(
        seed=params.seed,
        model=params.model,
        prepare=params.prepare,
        gold=params.gold,
        out=tmp_path,
        log=lambda row: None,
    )
    for path in sorted((made[0] / "data").iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_prompts_that_the_model_cannot_be_asked_are_rejected_before_anything_trains_on_the_others(params, tmp_path):
    language = load_base(params.model)
    language.tokenizer.chat_template = language.tokenizer.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.content == 'Be odd.' %}{{ raise_exception('too odd') }}{% endif %}",
    )
    save_model(language, tmp_path / "base")
    rows = [{"prompt": f"Question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(200)]
    rows[10]["prompt"] = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": "Who?"}]
    rows[20]["prompt"] = [{"role": "system", "content": "x" * 200}, {"role": "user", "content": "Who?"}]
    rows[30]["prompt"] = "long " * 40
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    settings = params.prepare.model_copy(update={"source": str(source), "format": "rows", "limit": None})
    model = params.model.model_copy(update={"base": str(tmp_path / "base")})
    out, logged = tmp_path / "out", []
    out.mkdir()
    prepare.run(seed=1, model=model, prepare=settings, gold=params.gold, out=out, log=logged.append)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["rule"]) for row in rejected] == [(11, "refused_by_template"), (21, "no_room")]
    assert "too odd" in rejected[0]["detail"]
    assert logged[-1]["cut_prompts"] == pytest.approx(1 / 198)


def test_human_preferences_are_split_and_their_rejects_kept(params, tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(200)]
    rows = [row | {"answer": n} for n, row in enumerate(rows)]
    lines = [json.dumps(row) for row in rows] + ['{"prompt": "x", "chosen": "", "rejected": "b"}']
    source.write_text("\n".join(lines))
    settings = params.prepare.model_copy(update={"source": str(source), "format": "rows", "limit": None})
    out = tmp_path / "out"
    out.mkdir()
    logged = []
    prepare.run(seed=1, model=params.model, prepare=settings, gold=params.gold, out=out, log=logged.append)
    assert json.loads((out / "rejected.jsonl").read_text()) | {"detail": ""} == {
        "file": str(source),
        "line": 201,
        "rule": "empty",
        "detail": "",
    }
    assert logged[-1]["rejected_rows"] == 1
    told = json.loads((out / "summary.json").read_text())
    assert (told["rejected"], told["columns"]) == ({"empty": 1}, ["answer"])
    assert "1 of 201 rows are left out: 1 empty" in capsys.readouterr().err
    for name in ("ppo", "evaluate"):
        found = read_table(out, name)
        answers = [int(row["prompt"][0]["content"].split()[1]) for row in found]
        assert columns_of(found) == {"answer": answers}
    assert sum(len(read_table(out, name)) for name in SCHEMAS) == 200


def test_a_split_without_prompts_is_told_before_the_model_answers(params, tmp_path):
    few, away = params.prepare.model_copy(update={"limit": 2}), params.model.model_copy(update={"base": "nowhere.gguf"})
    with pytest.raises(ValueError, match=r"prepare: no rows for \w+; raise prepare\.shares"):
        prepare.run(seed=1, model=away, prepare=few, gold=params.gold, out=tmp_path, log=print)


def test_answers_that_are_all_cut_are_told_with_the_setting_that_cut_them(params, tmp_path):
    one = params.model.model_copy(update={"response_tokens": 1})
    with pytest.raises(ValueError, match=r"prepare: no rows for sft: .* raise model\.response_tokens"):
        prepare.run(seed=1, model=one, prepare=params.prepare, gold=params.gold, out=tmp_path, log=print)


def test_a_column_makes_another_row_and_another_data_set():
    row = {"prompt": [{"role": "user", "content": "Hi"}], "topic": None}
    assert row_hash(row) == row_hash(row | {"columns": None})
    assert len({row_hash(row | {"columns": text}) for text in (None, '{"a": 1}', '{"a": 2}')}) == 3


def test_every_head_differs_and_is_normalised_on_the_reference_responses(made):
    root, rows = made
    features = PairFeatures.load(root / "reward")
    scores = RewardHeads.load(root / "ensemble").score(features.reference).mean
    torch.testing.assert_close(scores.mean(0), torch.zeros(scores.shape[1]), atol=1e-4, rtol=0)
    assert torch.corrcoef(scores.T).fill_diagonal_(0).max() < 0.9999
    assert 0 <= rows["ensemble"][-1]["heldout_accuracy_mean"] <= 1


def test_heads_that_all_give_the_same_scores_are_refused():
    scores = Scores(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.ones(2, 2))
    with pytest.raises(ValueError, match="all reward heads give the same scores"):
        ensemble._refuse_identical(scores)
    ensemble._refuse_identical(scores._replace(mean=scores.mean + torch.tensor([0.0, 0.1])))
    ensemble._refuse_identical(Scores(torch.ones(2, 1), torch.ones(2, 1)))


@pytest.mark.parametrize("loss", ["reparam_mse", "gaussian_nll", "bradley_terry"])
@pytest.mark.parametrize("target", ["stage1_reward", "margin"])
def test_every_way_to_train_the_ensemble_lowers_its_loss(made, params, tmp_path, loss, target):
    settings = params.ensemble.model_copy(update={"loss": loss, "target": target, "weight_decay": 0.0})
    rows = []
    ensemble.run(
        seed=1, model=params.model, ensemble=settings, reward=made[0] / "reward", out=tmp_path, log=rows.append
    )
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_the_evaluation_compares_every_policy_on_the_same_prompts(made, params):
    root, _ = made
    found = json.loads((root / "evaluate" / "evaluation.json").read_text())
    assert [policy["name"] for policy in found["policies"]] == ["sft", "single", "robust"]
    asked = len(prompts(root / "data", "evaluate"))
    assert all(policy["metrics"]["gold"]["n"] == asked for policy in found["policies"])
    assert found["policies"][0]["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-3)
    assert len(found["curves"]) == 2 * params.ppo.updates
    assert set(found["samples"][0]["responses"]) == {"sft", "single", "robust"}
    assert all(math.isfinite(policy["metrics"]["second_opinion"]["mean"]) for policy in found["policies"])


def test_every_number_of_the_evaluation_has_its_meaning(made):
    found = json.loads((made[0] / "evaluate" / "evaluation.json").read_text())
    scored = {"judge_score"}  # by a judge that is a reward model; here it is one behind an address
    assert {metric for policy in found["policies"] for metric in policy["metrics"]} == set(METRICS) - scored


def test_the_evaluation_shows_what_each_policy_wrote_as_it_trained(made, params):
    root, _ = made
    found = json.loads((root / "evaluate" / "evaluation.json").read_text())["excerpts"]
    kept = pq.read_table(root / "robust" / "rollouts.parquet").to_pylist()
    asked = prompts(root / "data", "ppo")
    assert set(found) == {"single", "robust"}
    for row in found["robust"]:
        same = [one for one in kept if (one["update"], one["response"]) == (row["update"], row["response"])]
        assert row["prompt"] in {asked[one["prompt"]][-1]["content"] for one in same}
        assert isinstance(row["gold"], float)


def test_the_evaluation_judges_the_reward_models_and_their_agreement_with_gold(made):
    root, rows = made
    found = json.loads((root / "evaluate" / "evaluation.json").read_text())
    single, several = found["reward_models"]
    assert single["accuracy"]["single head"]["mean"] == pytest.approx(rows["reward"][-1]["heldout_accuracy"])
    assert several["accuracy"]["worst"]["mean"] == pytest.approx(rows["ensemble"][-1]["heldout_accuracy_worst"])
    assert several["calibration"]["ece"] == pytest.approx(rows["ensemble"][-1]["heldout_ece"], abs=1e-6)
    assert single["calibration"]["ece"] == pytest.approx(rows["reward"][-1]["heldout_ece"], abs=1e-6)
    assert [row["name"] for row in found["gold_agreement"]] == ["sft", "single", "robust"]
    assert all(0 <= row["share"]["mean"] <= 1 for policy in found["gold_agreement"] for row in policy["coverage"])


def test_the_curves_retell_what_training_logged(made):
    root, rows = made
    found = json.loads((root / "evaluate" / "evaluation.json").read_text())
    curve = [point for point in found["curves"] if point["policy"] == "robust"]
    for point, row in zip(curve, rows["robust"], strict=True):
        assert point["proxy"] == pytest.approx(row["proxy"], abs=1e-4)
        assert point["kl"] == pytest.approx(row["kl"], abs=1e-4)
        assert point["sigma"] == pytest.approx(row["sigma"], abs=1e-4)


def test_a_policy_folder_says_what_it_was_trained_for(made):
    arm, scale = read_arm(made[0] / "robust")
    assert arm == typed_arm(reward="robust", nominal_weight=0.4, credible=8.0, seed=1)
    assert scale.mean < 0 < scale.std  # of the least reward of several, over the reference responses
    assert pq.read_table(made[0] / "robust" / "rollouts.parquet").num_rows > 0


def test_every_policy_is_read_by_the_reward_functions_of_all_arms_and_by_a_reward_model_as_judge(
    made, params, tmp_path, monkeypatch
):
    root, _ = made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rule = "def length(completions, **_):\n    return [len(one[0]['content']) for one in completions]\n"
    (tmp_path / "length_rule.py").write_text(rule)
    arm = typed_arm(reward="single", functions={"length_rule:length": 0.5}, seed=1)
    policies = {"single": root / "single", "rules": tmp_path / "rules"}
    shutil.copytree(root / "single", policies["rules"])
    write_arm(policies["rules"], arm)
    inputs = {name: root / name for name in ("data", "sft", "reward", "ensemble")} | {"policies": policies}
    saved(tmp_path / "judge", QWEN)
    judged = params.evaluate.model_copy(update={"judge": Given(base="judge")})
    settings = {"seed": 1, "model": params.model, "gold": params.gold, "evaluate": judged}
    out = tmp_path / "out"
    out.mkdir()
    evaluate.run(**settings, **inputs, out=out, log=lambda row: None)
    found = json.loads((out / "evaluation.json").read_text())["policies"]
    metrics = {policy["name"]: policy["metrics"] for policy in found}
    assert all(0 < metrics[name]["function_length"]["mean"] <= 12 for name in ("sft", "single", "rules"))
    assert all(metrics[name]["function_length"]["stderr"] > 0 for name in metrics)
    expected = metrics["rules"]["proxy"]["mean"] + 0.5 * metrics["rules"]["function_length"]["mean"]
    assert metrics["rules"]["reward"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert "reward" not in metrics["single"]
    assert found[2]["functions"] == {"length_rule:length": 0.5}
    scores = {name: metrics[name]["judge_score"]["mean"] for name in metrics}
    assert metrics["sft"]["judge_win_rate"]["mean"] == 0.5
    assert scores["single"] == scores["rules"] != scores["sft"]
    points = [point for point in read_evaluation(out).curves if point.policy == "single"]
    assert len({point.judge_score for point in points}) == params.ppo.updates


def test_a_judge_behind_an_address_compares_every_policy_with_its_start(made):
    found, rows = read_evaluation(made[0] / "evaluate"), made[1]
    rates = found.measured("judge_win_rate")
    assert rates["sft"] == Measured(0.5, 0.0, found.measured("gold")["sft"].n)
    assert 0 <= rates["robust"].mean <= 1
    asked = found.judge.requests
    assert 0 < asked <= 2 * 2 * rates["robust"].n
    assert found.judge == OwnJudge("gpt-x", asked, 10 * asked, 2 * asked)
    told = {name: value for row in rows["evaluate"] for name, value in row.items()}
    assert (told["judge_requests"], told["robust_judge_win_rate"]) == (asked, rates["robust"].mean)
    html = render(found, profile="tiny", params={}, lineage=None, facts={}, trained={})
    assert f"gpt-x compared each response with the start&#39;s, in both orders: {asked} requests" in html


def test_repetition_is_the_share_of_words_said_before():
    assert evaluate.repetition("love the love the") == 0.5
    assert evaluate.repetition("") == 0.0
