"""`hf-msae export-steering`: a saved steering as a model, or as a file that another program reads."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hf_msae.cli import common_fields
from hf_msae.cli.parser import build_parser, parse

if TYPE_CHECKING:
    from hf_msae.steering import Steering

DESCRIPTION = """\
Write a steering that is saved beside an SAE (steering.json) so that it works without hf_msae: as a language model with
a bias in it, as a control vector of llama.cpp, or for lm-evaluation-harness. Only a vector that is the same for every
token can be written so: edits that add, on all positions."""

# What to do with each, where {out} was written for the language model {model}.
USES = {
    "model": "AutoModelForCausalLM.from_pretrained({out!r}), and whatever else runs models of transformers",
    "gguf": "llama-cli -m MODEL.gguf --control-vector {out}    (MODEL.gguf: {model}, converted)",
    "lm-eval": "lm_eval --model steered --model_args pretrained={model},steer_path={out} --tasks TASKS",
}


@dataclass
class ExportSteeringArguments:
    """What is written, and where."""

    _argument_group_name = "export"
    _positional = ("saved",)

    saved: str = field(metadata={"help": "A folder or a Hub repo with an SAE and its steerings."})
    to: Literal["model", "gguf", "lm-eval"] = field(metadata={"help": "What is written."})
    output: str = field(metadata={"help": "The folder (model) or file (.gguf; .pt for lm-eval), not there yet."})
    steering: str | None = field(default=None, metadata={"help": "The steering's name, where there are several."})
    subfolder: str = common_fields.subfolder()
    model: str | None = common_fields.language_model()


def run(arguments: list[str]) -> None:
    """Parse, load what the form needs, write it."""
    (args,) = parse(build_parser("export-steering", DESCRIPTION, (ExportSteeringArguments,)), arguments)

    from hf_msae.cli.sources import check_sae_place
    from hf_msae.steering import SteeredPipeline, check_constant, export_model, load_steering
    from hf_msae.steering.exporting import check_free
    from hf_msae.worlds.stories import STORIES, story_lm_path

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    check_sae_place(args.saved)
    check_free(args.output)
    steering = load_steering(args.saved, args.steering, subfolder=args.subfolder)
    check_constant(steering)
    if args.to == "model":
        pipe = SteeredPipeline.from_pretrained(args.saved, steering.name, model=args.model, subfolder=args.subfolder)
        export_model(pipe.model, pipe.saes, steering, args.output, tokenizer=pipe.tokenizer)
        model_name = pipe.model.config.name_or_path
    else:
        model_name = _write_file(args, steering)
    if model_name == STORIES:
        model_name = str(story_lm_path())
    print(
        f"Wrote the steering {steering.name!r} to {args.output}. It acts on every token; special tokens and outliers, "
        f"which hf-msae leaves alone, are shifted as well.\n{USES[args.to].format(out=args.output, model=model_name)}"
    )


def _write_file(args: ExportSteeringArguments, steering: "Steering") -> str:
    """Write a form that needs nothing of the language model but its modules' names; the model's name."""
    from hf_msae.language_models import load_language_model_config, model_to_load, outline_of
    from hf_msae.steering import export_gguf, export_lm_eval
    from hf_msae.steering.saved import load_saes_of

    saes = load_saes_of(steering, args.saved, subfolder=args.subfolder)
    name, revision = model_to_load(next(iter(saes.values())).config, args.saved, args.model)
    model = outline_of(name, load_language_model_config(name, revision=revision))
    export = export_gguf if args.to == "gguf" else export_lm_eval
    export(model, saes, steering, args.output)
    return name
