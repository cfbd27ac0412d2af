"""Loading: what is refused by name, the tokens that end a response, dates, and what is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrlhf.models.load import ModelError, load_base, load_model, save_model
from rrlhf.models.rollout import Draws, most_likely, sample
from rrlhf.models.text import Texts
from rrlhf.models.top import PolicyTop


@pytest.fixture(scope="module")
def settings(model):
    return model.model_copy(update={"response_tokens": 8})


@pytest.fixture
def folder(settings, tmp_path):
    """A small model as people bring one: a transformers folder."""
    save_model(load_base(settings), tmp_path / "base")
    return tmp_path / "base"


def at(settings, folder, **changed):
    return settings.model_copy(update={"base": str(folder), **changed})


def configure(folder, file="config.json", **changed):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_training_the_policy_leaves_the_reference_and_the_lower_layers_alone(settings):
    language = load_base(settings)
    language.network.requires_grad_(False)
    top = PolicyTop(language, 1)
    top.let_train()
    reference = top.reference()
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    lower = language.network.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        for parameter in top.layers.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    assert torch.equal(language.network.model.layers[0].mlp.up_proj.weight, lower)
    assert reference.unembed.weight is top.unembed.weight


def test_a_saved_model_is_a_plain_transformers_folder(settings, tmp_path):
    language = load_base(settings)
    save_model(language, tmp_path)
    again = load_model(tmp_path, settings)
    tokens = torch.randint(3, 60, (1, 6))
    assert torch.equal(again.network(tokens).logits, language.network(tokens).logits)
    assert again.tokenizer.chat_template == language.tokenizer.chat_template
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("load", [load_base, lambda settings: load_model(settings.base, settings)])
def test_weights_that_are_not_in_the_file_are_refused_by_name(settings, folder, load):
    configure(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"weights model\.layers\.3\S+, .* and 6 more are not in its file"):
        load(at(settings, folder))
    configure(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"weights model\.layers\.2\S+ .*belong to no part of a causal language model"):
        load(at(settings, folder))
    configure(folder, num_hidden_layers=3, intermediate_size=65)
    with pytest.raises(ModelError, match=r"weights model\.layers\.0\.mlp\S+ .*other shapes in its file than config"):
        load(at(settings, folder))


def test_a_classifier_is_no_base(settings, folder):
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")[:1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as refused:
        load_base(at(settings, folder))
    assert "weights lm_head.weight are not in its file" in str(refused.value)
    assert "weights score.weight are in its file and belong to no part" in str(refused.value)


def test_weights_are_checked_without_reading_them(settings, folder):
    language = load_base(at(settings, folder), weights=False)
    assert language.device.type == "meta"
    configure(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match="are not in its file"):
        load_base(at(settings, folder), weights=False)


def test_tied_weights_are_no_false_alarm(settings, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    configure(folder, tie_word_embeddings=True)
    network = load_base(at(settings, folder)).network
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_more_tokens_than_embeddings_are_refused_with_both_numbers(settings, folder):
    language = load_base(settings)
    rows = language.network.get_input_embeddings().num_embeddings
    language.tokenizer.add_tokens([f"new{i}" for i in range(rows)])
    language.tokenizer.save_pretrained(folder)
    last = max(language.tokenizer.get_vocab().values())
    with pytest.raises(ModelError, match=f"its tokenizer has ids up to {last}, its embeddings {rows} rows"):
        load_base(at(settings, folder))


def test_an_adapter_is_refused_with_the_way_out(settings, tmp_path):
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path="base", target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"an adapter, not a model\. Merge it into its base first"):
        load_base(at(settings, tmp_path))


def test_a_model_of_another_layout_runs_whole_and_says_why(settings, folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = load_base(settings).network.config.vocab_size
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=size)).save_pretrained(folder)
    [note] = load_base(at(settings, folder)).notes
    assert "its layers (model_type gpt2) do not run one by one" in note
    assert "every pass runs all of it: ppo.trains lora needs the least" in note


def test_prompt_and_response_beyond_the_context_are_refused(settings, folder):
    configure(folder, max_position_embeddings=71)
    with pytest.raises(ModelError, match=r"made for 71 tokens \(max_position_embeddings\), .* take 72"):
        load_base(at(settings, folder))
    load_base(at(settings, folder, prompt_tokens=63))


def test_a_tokenizer_without_a_template_gets_ours_with_its_own_end(settings, folder):
    tokenizer = load_base(settings).tokenizer
    tokenizer.chat_template = None
    tokenizer.eos_token = "<unk>"
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    language = load_base(at(settings, folder))
    assert language.end == tokenizer.unk_token_id
    prompt = Texts(language, settings).prompt([{"role": "user", "content": "Hi"}])
    assert language.tokenizer.decode(prompt) == "<|user|>Hi<unk><|assistant|>"


@pytest.fixture
def several_ends(settings, folder):
    """The template ends a turn with <|system|>; generation_config lists </s>; the tokenizer's own end is <unk>."""
    tokenizer = load_base(settings).tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<|system|>\n")
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder)
    configure(folder, "generation_config.json", eos_token_id=[1])
    return load_base(at(settings, folder)), [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|system|>", "</s>", "<unk>")
    ]


def test_the_end_that_the_template_writes_comes_first_and_all_are_saved(several_ends, settings, tmp_path):
    from transformers import GenerationConfig

    language, ends = several_ends
    assert language.ends == ends
    save_model(language, tmp_path)
    assert load_model(tmp_path, settings).ends == ends
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends


def test_every_end_ends_a_response(several_ends, settings):
    language, ends = several_ends
    with torch.no_grad():
        for end in ends:
            language.network.lm_head.weight[end].mul_(20)
    drawn = sample(language, [[3, 9, 12]] * 60, 30, Draws(torch.Generator().manual_seed(0)))
    said = [row[-1] for row in drawn.lists()]
    assert set(said) >= set(ends)
    for row, finished in zip(drawn.lists(), drawn.finished.tolist(), strict=True):
        assert not set(row[:-1]) & set(ends)
        assert finished == (row[-1] in ends)
    answer = most_likely(language, [3, 9, 12], 40)
    assert not set(answer[:-1]) & set(ends)
    assert Texts(language, settings).answer("Hi")[-1] == language.end == ends[0]


@pytest.fixture
def dated(settings, folder):
    def write(template):
        (folder / "chat_template.jinja").write_text(template)
        return at(settings, folder, date="2024-07-26")

    return write


def test_a_template_that_prints_todays_date_prints_the_one_of_the_settings(dated, tmp_path):
    from transformers import AutoTokenizer

    settings = dated("{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    language = load_base(settings)
    hello = [{"role": "user", "content": "Hi"}]
    assert language.tokenizer.decode(Texts(language, settings).prompt(hello)) == "26 Jul 2024|Hi</s>"
    save_model(language, tmp_path / "saved")  # so that whoever loads it gives the prompts that it was trained on
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain.apply_chat_template(hello, tokenize=False) == "26 Jul 2024|Hi</s>"


def test_a_time_that_cannot_be_pinned_is_refused(dated):
    with pytest.raises(ModelError, match="prints the time in a way that cannot be pinned"):
        load_base(dated("{% set f = '%H:%M' %}{{ strftime_now(f) }}{% for m in messages %}{{ m.content }}{% endfor %}"))


@pytest.mark.parametrize(("told", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_weights_are_saved_in_the_dtype_of_the_base_unless_told_otherwise(settings, folder, tmp_path, told, expected):
    language = load_base(settings)
    save_model(language._replace(dtype=torch.bfloat16), folder)
    again = load_base(at(settings, folder, save_dtype=told))
    assert again.network.dtype == torch.float32  # in memory
    save_model(again, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {expected}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    assert load_model(tmp_path / "saved", settings).dtype == expected


def test_advice_that_transformers_would_not_write_is_saved_as_it_came(settings, folder, tmp_path):
    advice = {"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}  # no do_sample, as in Llama 2's
    configure(folder, "generation_config.json", **advice)
    save_model(load_base(at(settings, folder)), tmp_path)
    assert advice.items() <= json.loads((tmp_path / "generation_config.json").read_text()).items()


def test_what_a_pass_returns_is_not_for_the_base_to_say(settings, folder, tmp_path):
    configure(folder, return_dict=False, output_attentions=True)
    language = load_base(at(settings, folder))
    assert language.network(torch.tensor([[5, 6]])).logits.shape[1] == 2
    save_model(language, tmp_path)


def test_whether_a_make_was_tried_before_changes_no_random_number(settings, folder):
    """Adapters are drawn after a model is loaded, in processes that tried its make and in those that had to."""
    configure(folder, rms_norm_eps=1.5e-6)  # of no other test's model
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        load_base(at(settings, folder))
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]
