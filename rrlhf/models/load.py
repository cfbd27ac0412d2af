"""Language models: where they come from, what of them is refused, and how they are saved."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rrlhf.config import Model
from rrlhf.files import sync
from rrlhf.memo import sha256
from rrlhf.models.layers import PACKED, register
from rrlhf.models.random import random_model
from rrlhf.models.shards import whole_state
from rrlhf.models.sources import base_location
from rrlhf.models.templates import CHAT_TEMPLATE, ends, pin_date, tokenizer_problems
from rrlhf.models.trial import refusal, why_whole
from rrlhf.models.whole import decoder_layers, recompute
from rrlhf.progress import is_main_process


class LanguageModel(NamedTuple):
    """A causal language model with its tokenizer. What trains of its weights is float32 in memory."""

    network: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    dtype: torch.dtype = torch.float32  # of its weights when they are saved
    notes: tuple[str, ...] = ()  # what a person should know of how it is used
    adapters: Any = None  # peft.PeftModel around the network, where adapters stand beside its maps
    by_layers: bool = True  # whether its layers run one by one (layers.py); else it runs whole (whole.py)
    generation: Any = None  # transformers.GenerationConfig that is saved with it; sampling here follows no other advice
    score: Any = None  # torch.nn.Linear that makes a reward of the last token's final state; None: it brought none

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return len(decoder_layers(self.network))

    @property
    def width(self) -> int:
        """How many numbers a state has."""
        return int(self.network.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return torch.device(self.network.device)

    @property
    def padding(self) -> int | None:
        """The token that its configuration calls padding."""
        found: int | None = self.network.config.get_text_config().pad_token_id
        return found

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response; the first is the one that the chat template writes."""
        found: list[int] = self.network.generation_config.eos_token_id
        return found

    @property
    def end(self) -> int:
        """The token with which the chat template ends a response."""
        return self.ends[0]


class ModelError(ValueError):
    """A model cannot be used as it is: every reason, a line each, and the way out."""


def load_base(model: Model, *, weights: bool = True, fetch: bool = True, reward_model: bool = False) -> LanguageModel:
    """Load `model.base` from a hub id, a folder, a GGUF file, a package, or make it at random.

    weights: whether they are read; without them the model has shapes only. fetch: whether files of the hub that are not
    here are downloaded. reward_model: whether it may be one, a sequence classifier with one label. Raises ModelError
    when it cannot be used.
    """
    if model.base.startswith("random:"):
        network, tokenizer = random_model(model.base)
        kept = _saved(network.config, model)
        return _ready(LanguageModel(network.to(_held(model)), tokenizer, kept), model.base, model)
    return _loaded(_place(model), model.base, model, weights=weights, fetch=fetch, reward_model=reward_model)


def load_shape(model: Model) -> LanguageModel:
    """Return a base as shapes on the meta device, without a tokenizer; of a hub id, config.json alone is read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        if model.base.startswith("random:"):
            language = LanguageModel(*random_model(model.base))
        else:
            place = _place(model)
            config = _config(place, model.base, {} if isinstance(place, Path) else {"revision": model.revision})
            language = LanguageModel(AutoModelForCausalLM.from_config(config), None, _saved(config, model))
        language.network.to(_held(model)).requires_grad_(False)
    return language._replace(by_layers=_made_to_run(language.network.eval(), model) is None)


def _place(model: Model) -> Path | str:
    """Return the folder of a base, or its hub id."""
    place = base_location(model)
    return _converted(place) if isinstance(place, Path) and place.suffix == ".gguf" else place


def load_model(folder: Path, model: Model, *, weights: bool = True) -> LanguageModel:
    """Load a saved model folder; model: the settings of the run; weights: as of `load_base`.

    Raises ModelError when it cannot be used.
    """
    return _loaded(folder, str(folder), model, weights=weights)


def save_model(language: LanguageModel, folder: Path) -> None:
    """Write a folder that transformers loads: safetensors weights, config and tokenizer.

    The network's weights are given the dtype that they are saved in, in place: saving comes last. All processes of a
    launch call it, and the main one writes.
    """
    network = language.network.to(language.dtype)
    state = whole_state(network)
    if not is_main_process():
        return
    network.save_pretrained(folder, state_dict=state)
    language.tokenizer.save_pretrained(folder)
    if language.generation is not None:
        # As it came: `save_pretrained` refuses what many have, such as a temperature without do_sample.
        language.generation.to_json_file(folder / "generation_config.json")


def _loaded(
    place: Path | str,
    name: str,
    model: Model,
    *,
    weights: bool = True,
    fetch: bool = False,
    reward_model: bool = False,
) -> LanguageModel:
    """Load a folder or a hub id."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    is_local = isinstance(place, Path)
    options: dict[str, Any] = {"local_files_only": is_local or not fetch}
    options |= {} if is_local else {"revision": model.revision}
    if find_adapter_config_file(place, **options):
        raise ModelError(
            f"{name}: an adapter, not a model. Merge it into its base first, and name the folder with the result: "
            "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER), and the "
            "tokenizer likewise"
        )
    options["trust_remote_code"] = False
    how: dict[str, Any] = {} if weights else {"device_map": "meta"}
    how |= {} if model.attn_implementation == "auto" else {"attn_implementation": model.attn_implementation}
    with _refusing(name, model.attn_implementation):
        if isinstance(place, Path):
            _check_files(place)
        config = _config(place, name, options)
        scores = reward_model and any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
        make: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        network, report = make.from_pretrained(
            place,
            config=config,
            dtype=_held(model),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **how,
            **options,
        )
        problems = [*_weight_problems(report, "reward model" if scores else "causal language model")]
        score = None
        if scores:
            network, score, wrong = _opened(network, name)
            problems += wrong
        kept, tokenizer = _saved(config, model), AutoTokenizer.from_pretrained(place, **options)
        return _ready(LanguageModel(network, tokenizer, kept, score=score), name, model, problems)


def _config(place: Path | str, name: str, options: dict[str, Any]) -> Any:  # transformers.PreTrainedConfig
    """Read config.json. Raises ModelError where it asks for code of the hub."""
    from transformers import AutoConfig

    returned = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
    config = AutoConfig.from_pretrained(place, **returned, **options | {"trust_remote_code": False})
    if "/" in str(config._attn_implementation):
        raise ModelError(f"{name}: its config.json asks for code of the hub, {config._attn_implementation}")
    return config


def _check_files(folder: Path) -> None:
    """Raise ValueError for weights that are pickles, which can hold code, or that lie outside their folder."""
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        raise ValueError(
            "its weights are a pickle (*.bin), which can hold code: have whoever made it write safetensors, as "
            "save_pretrained does"
        )
    for index in folder.glob("*.index.json"):
        outside = {name for name in json.loads(index.read_bytes())["weight_map"].values() if Path(name).name != name}
        if outside:
            raise ValueError(f"{index.name} names files outside of the folder: {', '.join(sorted(outside))}")


@contextlib.contextmanager
def _refusing(name: str, attention: str = "auto") -> Iterator[None]:
    """Turn whatever is raised for files that cannot be used, or that would have to be run, into ModelError."""
    try:
        yield
    except (ModelError, OSError, RuntimeError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "trust_remote_code" in str(error):
            said = "it needs code that comes with it to be run, and rrlhf runs none: take a make that transformers has"
        elif attention != "auto":
            said = f"model.attn_implementation {attention}: {said}"
        raise ModelError(f"{name}: {said}") from error


def _opened(classifier: Any, name: str) -> tuple[Any, Any, list[str]]:
    """Take a sequence classifier apart: its decoder as a language model, the map that scores, and what is wrong.

    The language model's output matrix is the input embeddings: nothing is sampled from it. Raises ModelError when the
    score is no linear map of the decoder's last state.
    """
    from transformers import AutoModelForCausalLM

    config, score = classifier.config, getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(
            f"{name}: a reward model must score by one linear map of a decoder's last state (`score`), as those of the "
            f"Llama, Qwen, Mistral, Gemma and GPT-2 families do; {type(classifier).__name__} does not"
        )
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    setattr(network, network.base_model_prefix, classifier.base_model)
    network.config = config
    output, config.get_text_config().tie_word_embeddings = network.get_output_embeddings(), True
    output.weight = network.get_input_embeddings().weight
    if output.bias is not None:
        output.bias = nn.Parameter(output.weight.new_zeros(len(output.weight)))
    labels = f"it gives {score.out_features} scores (num_labels in config.json), a reward model gives one"
    return network, score, [] if score.out_features == 1 else [labels]


def _held(model: Model) -> torch.dtype:
    """Return the dtype of weights in memory, but for those that train."""
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def _saved(config: Any, model: Model) -> torch.dtype:
    """Return the dtype in which weights are saved."""
    found: torch.dtype = config.dtype or torch.float32
    return found if model.save_dtype == "auto" else getattr(torch, model.save_dtype)


def _weight_problems(report: dict[str, Any], kind: str) -> Iterator[str]:
    """Yield what transformers says about weights that it did not find, did not expect, or that have other shapes."""
    mismatched = {each if isinstance(each, str) else each[0] for each in report.get("mismatched_keys", ())}
    for names, what in (
        (set(report.get("missing_keys", ())), "are not in its file, so they would be drawn at random"),
        (set(report.get("unexpected_keys", ())), f"are in its file and belong to no part of a {kind}"),
        (mismatched, "have other shapes in its file than config.json says"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield f"weights {shown} {what}"
    yield from (str(error) for error in report.get("error_msgs", ()))


def _ready(language: LanguageModel, name: str, model: Model, problems: Sequence[str] = ()) -> LanguageModel:
    """Make a model ready to run. Raises ModelError with these problems and all that it finds."""
    from transformers import GenerationConfig

    network, tokenizer, *_ = language
    network.eval()  # no stage wants dropout
    notes = []
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        notes.append("its tokenizer brings no chat template, so a plain one of rrlhf's is used and saved with it")
    problems = [*problems, *tokenizer_problems(network, tokenizer)]
    if "strftime_now(" in tokenizer.get_chat_template():
        problems += pin_date(tokenizer, date.fromisoformat(model.date))
        notes.append(f"its chat template prints today's date, which is pinned to model.date, {model.date}")
    tokens = model.prompt_tokens + model.response_tokens
    if why := refusal(network.config, tokens):
        problems.append(why)
    if problems:
        raise ModelError("\n".join(f"{name}: {problem}" for problem in problems))
    if (whole := _made_to_run(network, model)) and language.score is None:
        notes.append(f"{whole}, so every pass runs all of it: ppo.trains lora needs the least memory and time then")
    network.generation_config.eos_token_id = found = ends(network, tokenizer)
    generation, network.generation_config = network.generation_config, GenerationConfig(eos_token_id=found)
    return language._replace(notes=tuple(notes), by_layers=whole is None, generation=generation)


def _made_to_run(network: Any, model: Model) -> str | None:
    """Make a network run as the settings say, in place; say why it runs whole, if it does."""
    tokens = model.prompt_tokens + model.response_tokens
    whole = why_whole(network.config, tokens, model.attn_implementation)
    if whole is None:
        register()
        network.set_attn_implementation(PACKED)
    if model.gradient_checkpointing:
        recompute(network)
    return whole


def _converted(gguf: Path) -> Path:
    """Return the folder with a GGUF file's weights as plain tensors; converted once: parsing takes half a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrlhf" / "base"
    folder = cache / f"{sha256(gguf)}-{version('transformers')}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as beside, _refusing(str(gguf)):
            options = {"gguf_file": gguf.name, "trust_remote_code": False}
            dequantized = GgufConfig(dequantize=True)
            network = AutoModelForCausalLM.from_pretrained(
                gguf.parent, quantization_config=dequantized, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
            staged = Path(beside) / "model"
            save_model(LanguageModel(network, tokenizer), staged)
            for path in staged.iterdir():
                sync(path)
            with contextlib.suppress(OSError):  # another process was first
                staged.rename(folder)
    return folder
