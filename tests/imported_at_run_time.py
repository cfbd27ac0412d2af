"""Run every stage of a small pipeline, and write which of our functions each executed: see test_closure.py."""

import gc
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path

SMALL = {
    "prepare.limit": 128,  # noise seldom ends
    "sft.epochs": 1,
    "reward.epochs": 1,
    "ensemble.epochs": 1,
    "ensemble.kind": "warm",
    "ensemble.heads": 2,
    "ppo.updates": 1,
    "ppo.epochs": 1,
    "ppo.prompts_per_update": 4,
    "ppo.minibatch_size": 4,
    "model.response_tokens": 6,
    "arms.single": None,
    "arms.robust.functions": {"rrlhf_rules:short": 0.5},
}


def run(document, inputs, out):
    """Run a stage with every module of ours imported anew; return module and name of what was called for it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rrlhf"]:
        del sys.modules[name]
    launch = import_module("rrlhf.pipeline.launch")
    executed = set()

    def note(frame, event, _):
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, not the body of a class
            executed.add((str(frame.f_globals.get("__name__")), frame.f_code.co_qualname.partition(".")[0]))

    out.mkdir()
    sections, arguments = launch.typed_sections(document["params"]), launch._arguments(inputs)
    stage = import_module(f"rrlhf.stages.{document['stage']}")
    sys.settrace(note)  # calls alone: `note` returns no tracer of lines
    try:
        stage.run(**sections, **arguments, out=out, log=lambda row: None)
    finally:
        sys.settrace(None)
    return {each for each in executed if each[0].partition(".")[0] == "rrlhf"}


def reward_model(model, folder):
    """Save a reward model as people have one."""
    from transformers import LlamaForSequenceClassification

    from rrlhf.models.load import load_base

    language = load_base(model)
    language.network.config.num_labels = 1
    LlamaForSequenceClassification(language.network.config).save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)
    return folder


def main(root):
    import torch

    from rrlhf.pipeline.graph import nodes
    from rrlhf.pipeline.keys import key_document
    from rrlhf.pipeline.params import load_params

    torch.set_num_threads(1)
    (root / "rrlhf_rules.py").write_text("def short(completions): return [1.0 for _ in completions]\n")
    sys.path.insert(0, str(root))
    graph = nodes(params := load_params(Path(__file__).parents[1], "tiny", SMALL))
    brought = {
        "ensemble.kind": "given",
        "ensemble.models": [{"base": str(reward_model(params.model, root / "brought"))}],
    }
    alone = nodes(load_params(Path(__file__).parents[1], "tiny", SMALL | brought))
    graph += [node for node in alone if node.stage == "given"]
    documents = {node.name: key_document(node, {}) for node in graph}
    used = {}
    for node in graph:
        inputs = {argument: root / name for argument, name in node.inputs.items()}
        used.setdefault(node.stage, set()).update(run(documents[node.name], inputs, root / node.name))
    (root / "found.json").write_text(json.dumps({stage: sorted(called) for stage, called in used.items()}))


if __name__ == "__main__":
    gc.disable()  # looking through all libraries takes longer than some stages
    main(Path(sys.argv[1]))
