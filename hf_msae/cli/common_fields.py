"""Fields that the dataclasses of several commands have, each beside what is its own, and what their flags say.

Read before anything that takes time is imported.
"""

from dataclasses import field
from typing import Any

# Of the SAE, which must be given: mypy takes a field that a function makes for one with a default.
SAE_HELP = "A folder or a Hub repo with an SAE."


def subfolder() -> Any:
    """Which one of several SAEs."""
    return field(default="", metadata={"help": "The SAE's folder in a repo of several."})


def prefix() -> Any:
    """How much of the SAE counts."""
    help_text = "Only the latents of this prefix, one of the SAE's levels. Default: all."
    return field(default=None, metadata={"help": help_text})


def site() -> Any:
    """Where the SAE reads."""
    return field(default=None, metadata={"help": "Site, where the SAE does not record one."})


def language_model() -> Any:
    """The language model of a command that reads no dataset."""
    return field(default=None, metadata={"help": "The language model. Default: the one that the SAE was trained on."})


def trust_remote_code() -> Any:
    """Whether a language model may bring code along."""
    return field(default=False, metadata={"help": "Run code that comes with the model."})


def quantization() -> Any:
    """To how many bits the language model is quantized."""
    words = "Have bitsandbytes quantize the language model. Default: as it was where the SAE was trained, else none."
    return field(default=None, metadata={"help": words})


def use_cpu() -> Any:
    """Where all is computed."""
    return field(default=False, metadata={"help": "Stay on the CPU even where an accelerator is present."})


def as_json() -> Any:
    """What is printed, of every command that prints a table."""
    help_text = "Print the result as one JSON object, and nothing else on standard output."
    return field(default=False, metadata={"help": help_text})
