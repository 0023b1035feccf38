"""Arguments from dataclasses, flags and a YAML file.

`transformers.HfArgumentParser` turns dataclass fields into flags. Three things are added: numbers as people write them
(500M, 65_536, 2k, 1/32), lists that may be given at once or by repeating the flag, and `--config run.yaml`, whose keys
are the flags' names and which flags override. `~` in front of a path is the user's home, wherever the shell leaves it
(in `--flag=~/x`, in YAML); in texts it stays.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_msae.errors import InputError

SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_float(text: str) -> float:
    """A number: 0.001, 3e-4, 1/32, 2k, 500M, 65_536."""
    original, text = text, text.strip().replace(",", "").lower()
    factor = 1
    if text and text[-1] in SUFFIXES:
        factor, text = SUFFIXES[text[-1]], text[:-1]
    try:
        if "/" in text:
            above, below = text.split("/")
            return float(above) / float(below) * factor
        return float(text) * factor
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{original!r} is not a number (write 65536, 65_536, 2k, 500M, 1e-3)"
        ) from None


def parse_int(text: str) -> int:
    """A whole number, in the same spellings."""
    number = parse_float(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


# Arguments that are texts, and no paths or names.
TEXTS = frozenset(
    {"prompt", "towards", "separator", "title", "commit_message", "release_title", "creator", "run_name", "hub_token"}
)
METAVARS: dict[Any, str] = {parse_int: "N", parse_float: "X"}


class Collect(argparse.Action):
    """A list that grows with every repetition of its flag; the first one replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        before = getattr(namespace, self.dest) if self.dest in given else []
        given.add(self.dest)
        setattr(namespace, self.dest, [*before, *values])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], argparse.SUPPRESS) or "Default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def build_parser(command: str, description: str, dataclasses: Sequence[Any]) -> HfArgumentParser:
    """A parser for `hf-msae COMMAND` with a group of flags per dataclass; the fields that a dataclass names in
    `_positional` are given by their place, those with a default optionally.
    """
    positional = [name for dataclass in dataclasses for name in dataclass.__dict__.get("_positional", ())]
    parser = HfArgumentParser(
        list(dataclasses),
        prog=f"hf-msae {command}",
        usage=" ".join([f"hf-msae {command}", *map(str.upper, positional), "[options]"]),
        description=description,
        formatter_class=HelpFormatter,
    )
    converters: dict[Any, Any] = {int: parse_int, float: parse_float, str: os.path.expanduser}
    for action in parser._actions:
        if action.type is not str or action.dest not in TEXTS:
            action.type = converters.get(action.type, action.type)
        # Flags may be written with either sign; showing both would double the help.
        action.option_strings = [flag for flag in action.option_strings if "_" not in flag]
        if action.choices is None and action.nargs != 0:
            action.metavar = METAVARS.get(action.type, "BOOL" if action.const is True else "TEXT")
        if action.dest in positional:
            # Without flags, an argument is found by its place.
            action.option_strings, action.metavar = [], action.dest.upper()
            action.nargs = None if action.required else "?"
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these arguments; flags override it.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    return parser


def parse(parser: HfArgumentParser, arguments: list[str]) -> tuple[Any, ...]:
    """The dataclasses, filled from defaults, then the YAML file, then flags."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config, _ = finder.parse_known_args(arguments)
    if config.config is not None:
        parser.set_defaults(**_read_yaml(parser, Path(config.config).expanduser()))
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[: len(list(parser.dataclass_types))]


def _read_yaml(parser: HfArgumentParser, path: Path) -> dict[str, Any]:
    """A file's values, converted as flags are; a null leaves the default, where None is no value."""
    if not path.is_file():
        raise InputError(f"There is no configuration file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML file that can be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `name: value` lines, got a {type(values).__name__}.")
    actions = {action.dest: action for action in parser._actions}
    kinds = {name: kind for dataclass in parser.dataclass_types for name, kind in get_type_hints(dataclass).items()}
    converted = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise InputError(f"{path} has an unknown key {key!r}. `{parser.prog} --help` lists the known ones.")
        if value is None and type(None) not in get_args(kinds.get(name)):
            continue
        converted[name] = _convert(actions[name], value, path)
    return converted


def _convert(action: argparse.Action, value: Any, path: Path) -> Any:
    if action.nargs == "+":
        return [_convert_one(action, item, path) for item in (value if isinstance(value, list) else [value])]
    return _convert_one(action, value, path)


def _convert_one(action: argparse.Action, value: Any, path: Path) -> Any:
    if value is None or not callable(action.type):
        return value
    try:
        return action.type(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InputError(f"{path}: {action.dest}: {error}") from None
