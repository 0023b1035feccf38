"""The parsers of the commands, as they are made when a command runs."""

import importlib

import pytest

from hf_msae.cli.main import COMMANDS
from hf_msae.cli.parser import CommandParser


class _ReachedError(Exception):
    """Carries the parser out of a command that is about to use it."""

    def __init__(self, parser: CommandParser) -> None:
        self.parser = parser


def parser_of(command: str) -> CommandParser:
    """The parser that `hf-msae COMMAND` makes: the command runs up to the place where it parses."""

    def stop(parser: CommandParser, arguments: list[str]) -> None:
        raise _ReachedError(parser)

    module = importlib.import_module(COMMANDS[command][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", stop)
        with pytest.raises(_ReachedError) as reached:
            module.run([])
    return reached.value.parser
