"""Arguments from dataclasses, flags and a YAML file.

A dataclass field is a flag, as `transformers.HfArgumentParser` makes them, but without importing transformers, which
takes a second. Added are numbers as people write them (500M, 65_536, 2k, 1/32), lists that may be given at once or by
repeating the flag, arguments that are given by their place, and `--config run.yaml`, whose keys are the flags' names,
aliases included, and which flags override. `~` in front of a path is the user's home, wherever the shell leaves it (in
`--flag=~/x`, in YAML); in texts it stays.
"""

import argparse
import difflib
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from hf_msae.errors import InputError

SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


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
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


def parse_bool(text: str) -> bool:
    """A switch: true or false, yes or no, 1 or 0."""
    try:
        return BOOLS[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


CONVERTERS: dict[Any, Callable[[str], Any]] = {
    int: parse_int,
    float: parse_float,
    bool: parse_bool,
    str: os.path.expanduser,
}
# Arguments that are texts, and no paths or names.
TEXTS = frozenset(
    {
        "prompt",
        "towards",
        "words",
        "separator",
        "title",
        "commit_message",
        "release_title",
        "creator",
        "run_name",
        "hub_token",
    }
)
METAVARS: dict[Any, str] = {parse_int: "N", parse_float: "X", parse_bool: "BOOL"}


class Collect(argparse.Action):
    """A list that grows with every repetition of its flag; the first one replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Called by argparse for every time that the flag is given."""
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


class CommandParser(argparse.ArgumentParser):
    """A command's parser: `argparse`'s, that knows its dataclasses and names the flag that a mistyped one is near."""

    def __init__(self, command: str, description: str, dataclasses: Sequence[type]) -> None:
        positional = _positional(dataclasses)
        super().__init__(
            prog=f"hf-msae {command}",
            usage=" ".join([f"hf-msae {command}", *map(str.upper, positional), "[options]"]),
            description=description,
            formatter_class=HelpFormatter,
        )
        self.dataclasses = tuple(dataclasses)

    def keys(self) -> dict[str, argparse.Action]:
        """The name of every argument, and every alias, as a YAML file may write it, with underscores."""
        names: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config", "debug"):
                names |= {flag.lstrip("-").replace("-", "_"): action for flag in action.option_strings}
                if not isinstance(action, argparse._StoreFalseAction):
                    names[action.dest] = action
        return names

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say which argument nobody asked for, and which one may be meant."""
        first = unknown[0]
        if not first.startswith("--"):
            raise InputError(f"unexpected argument {first!r}. `{self.prog} --help` lists what there is.")
        flag = first.split("=")[0]
        near = _nearest(flag.replace("_", "-"), [one for one in self._option_string_actions if "_" not in one])
        raise InputError(f"there is no {flag}{near} `{self.prog} --help` lists what there is.")


def _nearest(name: str, known: Iterable[str]) -> str:
    """A question after the known name that is most like this one, or a full stop."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else "."


def _positional(dataclasses: Sequence[type]) -> list[str]:
    return [name for dataclass in dataclasses for name in dataclass.__dict__.get("_positional", ())]


def build_parser(command: str, description: str, dataclasses: Sequence[type]) -> CommandParser:
    """A parser for `hf-msae COMMAND` with a group of flags per dataclass.

    Args:
        command: the command's name.
        description: what `--help` says first.
        dataclasses: their fields become arguments. `metadata` of a field may hold `help`, `aliases`, `nargs` and
            `const`; a list grows with every repetition of its flag. The fields that a dataclass names in `_positional`
            are given by their place, those with a default optionally; `_argument_group_name` is the title in `--help`.

    Returns:
        The parser, for `parse`.
    """
    parser = CommandParser(command, description, dataclasses)
    for dataclass in dataclasses:
        group = parser.add_argument_group(dataclass.__dict__.get("_argument_group_name", dataclass.__name__))
        hints = get_type_hints(dataclass)
        for field in fields(dataclass):
            if field.init:
                _add(group, field, hints[field.name], field.name in _positional([dataclass]))
    # Flags may be written with either sign; showing both would double the help.
    for action in parser._actions:
        action.option_strings = [flag for flag in action.option_strings if "_" not in flag]
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these arguments; flags override it.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    return parser


def _add(group: argparse._ArgumentGroup, field: "Field[Any]", hint: Any, positional: bool) -> None:
    """One field as an argument, and `--no-...` beside a switch that is on by default."""
    kind, many, choices = _describe(hint)
    options: dict[str, Any] = {
        name: field.metadata[name] for name in ("help", "nargs", "const") if name in field.metadata
    }
    options["type"] = CONVERTERS[kind] if kind is not str or field.name not in TEXTS else str
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    options["default"] = None if default is MISSING else default
    if many:
        options["nargs"] = "+"
        options["action"] = "store" if positional else Collect
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    if choices:
        options["choices"] = choices
    else:
        options["metavar"] = METAVARS.get(options["type"], "TEXT")
    if positional:
        options["metavar"] = field.name.upper()
        if default is not MISSING:
            options["nargs"] = "*" if many else "?"
        group.add_argument(field.name, **options)
        return
    flags = _spellings([f"--{field.name}", *field.metadata.get("aliases", ())])
    group.add_argument(*flags, dest=field.name, required=default is MISSING, **options)
    if kind is bool and default is not False:
        no = _spellings([f"--no_{field.name}"])
        group.add_argument(*no, dest=field.name, action="store_false", default=argparse.SUPPRESS)


def _spellings(flags: Sequence[str]) -> list[str]:
    """Each flag with either sign between its words."""
    names = [flag.removeprefix("--") for flag in flags]
    return list(
        dict.fromkeys(f"--{form}" for name in names for form in (name.replace("_", "-"), name.replace("-", "_")))
    )


def _describe(hint: Any) -> tuple[type, bool, list[str]]:
    """The type of an argument's values, whether it takes several, and what they may be."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is list:
        return get_args(hint)[0], True, []
    if get_origin(hint) is Literal:
        return str, False, list(get_args(hint))
    return hint, False, []


def by_place(command: str, arguments: Sequence[str], flag: str = "--sae") -> list[str]:
    """A command's arguments, with what a former flag gives moved behind what is given by its place.

    Says on standard error that the flag goes with the next version.
    """
    rest: list[str] = []
    values: list[str] = []
    taking = False
    for argument in arguments:
        name, sign, value = argument.partition("=")
        taking = name == flag or (taking and not argument.startswith("--"))
        if name != flag:
            (values if taking else rest).append(argument)
        elif sign:
            values.append(value)
            taking = False
    if values:
        print(f"hf-msae {command}: {flag} goes with the next version; name the SAE without it.", file=sys.stderr)
    start = next((place for place, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    return [*rest[:start], *values, *rest[start:]]


def parse(parser: CommandParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """The parser's dataclasses, filled from defaults, then the YAML file, then flags.

    Raises:
        InputError: a flag is not known, or the YAML file is absent, no YAML, or has a key or a value that no flag
            could have.
        SystemExit: as argparse ends, with 2, where a value cannot be read, and with 0 after `--help`.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config, _ = finder.parse_known_args(arguments)
    if config.config is not None:
        _set_defaults(parser, _read_yaml(parser, Path(config.config).expanduser()))
    # Intermixed, because argparse otherwise takes no optional place behind a flag: `encode SAE --pool max DATASET`.
    namespace, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        parser.refuse(unknown)
    found = []
    for dataclass in parser.dataclasses:
        names = [field.name for field in fields(dataclass) if field.init]
        found.append(dataclass(**{name: getattr(namespace, name) for name in names}))
    return tuple(found)


def _set_defaults(parser: CommandParser, values: dict[str, Any]) -> None:
    parser.set_defaults(**values)
    for action in parser._actions:
        if action.dest in values:
            action.required = False
            if not action.option_strings:
                action.nargs = "*" if isinstance(action, Collect) else "?"


def _read_yaml(parser: CommandParser, path: Path) -> dict[str, Any]:
    """A file's values, converted as flags are; a null leaves the default, where None is no value."""
    if not path.is_file():
        raise InputError(f"There is no configuration file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML file that can be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `name: value` lines, got a {type(values).__name__}.")
    keys = parser.keys()
    kinds = {name: kind for dataclass in parser.dataclasses for name, kind in get_type_hints(dataclass).items()}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in keys:
            raise InputError(
                f"{path} has an unknown key {key!r}{_nearest(name, keys)} `{parser.prog} --help` lists the known ones."
            )
        action = keys[name]
        if action.dest in converted:
            raise InputError(f"{path} gives {action.dest} twice, the second time as {key!r}.")
        if value is None and type(None) not in get_args(kinds[action.dest]):
            continue
        converted[action.dest] = _convert(action, value, path)
    return converted


def _convert(action: argparse.Action, value: Any, path: Path) -> Any:
    if isinstance(action, argparse._StoreFalseAction):
        return not _convert_with(parse_bool, action, value, path)
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_convert_with(action.type, action, item, path) for item in items]
    return _convert_with(action.type, action, value, path)


def _convert_with(converter: Any, action: argparse.Action, value: Any, path: Path) -> Any:
    if value is None:
        return value
    try:
        found = converter(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InputError(f"{path}: {action.dest}: {error}") from None
    if action.choices is not None and found not in action.choices:
        raise InputError(f"{path}: {action.dest}: {found!r} is none of {', '.join(map(str, action.choices))}.")
    return found
