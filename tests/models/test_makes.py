"""Models of every make, tiny and random: sampled, read, trained by PPO and saved, each against plain transformers."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import TINY

from rrlhf.models.adapters import merged
from rrlhf.models.load import ModelError, load_base, load_model, save_model
from rrlhf.models.rollout import Draws, sample
from rrlhf.models.states import hidden_states
from rrlhf.models.text import Texts
from rrlhf.models.top import PolicyTop, split_responses
from rrlhf.policy.learner import prepare_learner
from rrlhf.policy.reward import Prompts, load_reward_models
from rrlhf.rewards.trunk import Encoded, Trunk, load_trunk, save_trunk
from rrlhf.stages.ppo import train
from rrlhf.stages.sft import sharpen

WINDOW = 5
ALONE = {name: size for name, size in TINY.items() if name != "num_key_value_heads"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAKES = {  # and whether its layers run one by one
    "Llama": (transformers.LlamaConfig, TINY, True),
    "Llama with tied embeddings": (transformers.LlamaConfig, TINY | {"tie_word_embeddings": True}, True),
    "Llama with one key head": (transformers.LlamaConfig, TINY | {"num_key_value_heads": 1}, True),
    "Mistral with a sliding window": (transformers.MistralConfig, TINY | {"sliding_window": WINDOW}, True),
    "Qwen 2": (transformers.Qwen2Config, TINY, True),
    "Qwen 2 with windows in some layers": (
        transformers.Qwen2Config,
        TINY | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        True,
    ),
    "Qwen 3": (transformers.Qwen3Config, TINY | {"head_dim": 16}, True),
    "Phi 3 with a sliding window": (transformers.Phi3Config, TINY | {"sliding_window": WINDOW}, True),
    "OLMo 2": (transformers.Olmo2Config, TINY, True),
    "SmolLM 3": (transformers.SmolLM3Config, TINY, True),
    "Mixtral": (transformers.MixtralConfig, TINY | EXPERTS | {"sliding_window": None}, True),
    "Qwen 3 with experts": (
        transformers.Qwen3MoeConfig,
        TINY | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        True,
    ),
    "Gemma 2": (transformers.Gemma2Config, TINY | {"head_dim": 8, "sliding_window": WINDOW}, False),
    "Gemma 3": (transformers.Gemma3TextConfig, TINY | {"head_dim": 8, "sliding_window": WINDOW}, False),
    "Granite": (transformers.GraniteConfig, TINY | {"embedding_multiplier": 3.0, "logits_scaling": 2.0}, False),
    "GPT-2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}, False),
    "GPT-NeoX": (transformers.GPTNeoXConfig, ALONE, False),
    "Phi": (transformers.PhiConfig, TINY, False),
    "Mamba": (transformers.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}, False),
}
every_make = pytest.mark.parametrize("name", MAKES)
UNLIKE = {"Llama", "Gemma 2", "GPT-2", "Mamba"}  # each other; the rest train by `lora` and `full` as one of these does


def rows_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 60, (length,), generator=draw).tolist() for length in lengths]


PROMPTS = rows_of([WINDOW - 2, WINDOW, WINDOW + 1, 4 * WINDOW])  # below, at and beyond the window


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """A model of each make as people bring one, with the random model's tokenizer."""
    tokenizer, made = load_base(model).tokenizer, {}
    for name, (config, sizes, _) in MAKES.items():
        torch.manual_seed(0)
        ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        network = transformers.AutoModelForCausalLM.from_config(config(**sizes, **ids))
        for weight in network.parameters():  # far from how they begin, so that what is left out shows
            torch.nn.init.normal_(weight, *((0.0, weight.shape[-1] ** -0.5) if weight.dim() > 1 else (0.7, 0.2)))
        made[name] = tmp_path_factory.mktemp("make")
        network.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def brought(folders, model):
    """Load one as rrlhf does, and as transformers does."""

    def load(name, **changed):
        language = load_base(model.model_copy(update={"base": str(folders[name]), **changed}))
        own = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).eval()
        return language, own.requires_grad_(False)

    return load


def alone(own, prompt, response):
    """Log-probabilities of a response's tokens, of the network run on this row by itself."""
    logits = own(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@every_make
def test_samples_are_those_of_generate_and_have_its_log_probabilities(name, brought):
    language, own = brought(name)
    assert language.by_layers == MAKES[name][2]
    drawn = sample(language, PROMPTS, 12, Draws(torch.Generator().manual_seed(1)))
    for prompt, said, logprobs in zip(PROMPTS, drawn.lists(), drawn.logprobs, strict=True):
        torch.testing.assert_close(logprobs[: len(said)], alone(own, prompt, said), atol=1e-4, rtol=1e-4)
    if language.by_layers:  # what enters the layers that train comes with the samples
        drawn = sample(language, PROMPTS, 12, Draws(torch.Generator().manual_seed(1)), keep=(1,))
        read, _ = PolicyTop(language, 1)(drawn.states[1], drawn.prompt_lengths, drawn.responses, drawn.mask)
        torch.testing.assert_close(read, drawn.logprobs, atol=1e-4, rtol=1e-4)
    likeliest = sample(language, PROMPTS, 12, Draws(torch.Generator().manual_seed(1)), temperature=1e-6)
    for prompt, said in zip(PROMPTS, likeliest.lists(), strict=True):
        one = torch.tensor([prompt])
        greedy = own.generate(
            one, attention_mask=torch.ones_like(one), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert said == greedy[0, len(prompt) :].tolist()


@every_make
def test_what_is_read_of_rows_together_is_what_the_network_says_of_each_alone(name, brought):
    language, own = brought(name)
    rows = [prompt + response for prompt, response in zip(PROMPTS, rows_of([4, 7, 1, 6], seed=2), strict=True)]
    lengths = [len(prompt) for prompt in PROMPTS]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    read = PolicyTop(language, None).read(tokens, *split_responses(rows, lengths, language.device), layer=2)
    states = hidden_states(language, rows, 2)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = alone(own, row[:length], row[length:])
        torch.testing.assert_close(read.logprobs[number, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        entered = own(torch.tensor([row]), output_hidden_states=True).hidden_states[1 if name == "Mamba" else 2][0]
        for found in (read.states, states):
            torch.testing.assert_close(found[number, : len(row)], entered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "trains"),
    [
        pytest.param(name, trains, marks=[] if trains == "layers" or name in UNLIKE else pytest.mark.slow)
        for name in MAKES
        for trains in ("layers", "lora", "full")
    ],
)
def test_ppo_trains_it_and_transformers_loads_the_policy(name, trains, brought, ppo, rewards, model, tmp_path):
    language, own = brought(name)
    ppo = ppo.model_copy(update={"updates": 1, "epochs": 1, "trains": trains})
    models = load_reward_models(*rewards, torch.device("cpu"))
    torch.manual_seed(0)
    learner = prepare_learner(Accelerator(cpu=True), language, models, model=model, ppo=ppo, seed=0)
    [(row, _)] = train(learner, Prompts(PROMPTS), lambda scores: scores.single)
    assert row["optimizer_steps"] == 2
    assert abs(row["kl"]) < 1e-3
    assert abs(row["ratio"] - 1) < 0.1
    policy = merged(learner.language)
    save_model(policy, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([PROMPTS[-1]])
    said = plain(tokens).logits
    assert not torch.allclose(said, own(tokens).logits, atol=1e-5)
    torch.testing.assert_close(said, policy.network(tokens).logits, atol=1e-5, rtol=1e-5)
    again = load_model(tmp_path, model)
    assert again.ends == language.ends
    assert again.by_layers == language.by_layers


@every_make
def test_a_temperature_can_be_built_in(name, brought):
    language, own = brought(name)
    sharpen(language, 0.7)
    tokens = torch.tensor([PROMPTS[-1]])
    torch.testing.assert_close(language.network(tokens).logits, own(tokens).logits / 0.7, atol=1e-4, rtol=1e-4)


def test_own_draws_are_the_same_whichever_way_a_model_runs(brought):
    """One seed, two paths: rows that leave the batch when they end, and `generate`."""
    packed, _ = brought("Llama")
    whole, _ = brought("Llama", attn_implementation="eager")
    assert packed.by_layers
    assert not whole.by_layers
    assert whole.network.config._attn_implementation == "eager"
    one, other = (sample(each, PROMPTS * 8, 30, Draws(torch.Generator().manual_seed(3))) for each in (packed, whole))
    assert one.finished.any()
    assert one.lists() == other.lists()
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.entropy, other.entropy, atol=1e-4, rtol=1e-4)
    assert torch.equal(one.finished, other.finished)


@every_make
def test_a_trunk_that_was_saved_gives_the_same_features(name, brought, model, tmp_path):
    language, _ = brought(name)
    trunk = Trunk(language, 1, model, Texts(language, model))
    rows = [Encoded([*prompt, 9, 8, 7], len(prompt)) for prompt in PROMPTS]
    before = trunk.features(rows, 3)
    save_trunk(trunk, tmp_path, own=True)
    again = load_trunk(tmp_path, None)
    assert again.language.layers == 1
    torch.testing.assert_close(again.features(rows, 3), before, atol=1e-5, rtol=1e-5)


def test_a_models_own_advice_for_sampling_is_saved_with_it_and_not_followed(brought, folders, model, tmp_path):
    advice = transformers.GenerationConfig(repetition_penalty=9.0, temperature=0.3, do_sample=True, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_pretrained(folders["GPT-2"]).save_pretrained(tmp_path)
    load_base(model).tokenizer.save_pretrained(tmp_path)
    advice.save_pretrained(tmp_path)
    advised, (plain, _) = load_base(model.model_copy(update={"base": str(tmp_path)})), brought("GPT-2")
    one, other = (sample(each, PROMPTS, 12, Draws(torch.Generator().manual_seed(3))) for each in (advised, plain))
    assert one.lists() == other.lists()
    save_model(advised, tmp_path / "saved")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").repetition_penalty == 9.0


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
@pytest.mark.parametrize("trains", ["layers", "lora", "full"])
def test_in_bfloat16_only_what_trains_is_float32(name, trains, brought, ppo, rewards, model):
    language, _ = brought(name, dtype="bfloat16")
    model = model.model_copy(update={"dtype": "bfloat16"})
    models = load_reward_models(*rewards, torch.device("cpu"))
    ppo = ppo.model_copy(update={"updates": 1, "trains": trains})
    learner = prepare_learner(Accelerator(cpu=True), language, models, model=model, ppo=ppo, seed=0)
    dtypes = {(weight.dtype, weight.requires_grad) for weight in learner.top.parameters()}
    frozen = set() if trains == "full" else {(torch.bfloat16, False)}
    assert dtypes == {(torch.float32, True)} | frozen
    [(row, _)] = train(learner, Prompts(PROMPTS), lambda scores: scores.single)
    assert row["optimizer_steps"] == 4
    assert abs(row["kl"]) < 0.5  # of a policy that is still its reference, in nats: rounding


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradient(name, brought):
    rows = [prompt + response for prompt, response in zip(PROMPTS, rows_of([4, 7, 1, 6], seed=2), strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    ran = []

    def gradient(again):
        language, _ = brought(name, gradient_checkpointing=again)
        top = PolicyTop(language, None)
        top.layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(again))
        where = split_responses(rows, [len(prompt) for prompt in PROMPTS], language.device)
        top(tokens, *where)[0].sum().backward()
        return [weight.grad for weight in top.layers.parameters()]

    for one, other in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert ran == [False, True, True]


@pytest.mark.parametrize(("name", "attention"), [("Gemma 2", "sdpa"), ("Llama", "flash_attention_2")])
def test_an_attention_that_is_not_there_is_refused(name, attention, brought):
    with pytest.raises(ModelError, match=rf"model\.attn_implementation {attention}: \w+"):
        brought(name, attn_implementation=attention)
