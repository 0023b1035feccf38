"""The parsers of the commands, as they are made when a command runs."""

import importlib

import pytest
from transformers import HfArgumentParser

from hf_msae.cli.main import COMMANDS


class _ReachedError(Exception):
    """Carries the parser out of a command that is about to use it."""

    def __init__(self, parser: HfArgumentParser) -> None:
        self.parser = parser


def parser_of(command: str) -> HfArgumentParser:
    """The parser that `hf-msae COMMAND` makes: the command runs up to the place where it parses."""

    def stop(parser: HfArgumentParser, arguments: list[str]) -> None:
        raise _ReachedError(parser)

    module = importlib.import_module(COMMANDS[command][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", stop)
        with pytest.raises(_ReachedError) as reached:
            module.run([])
    return reached.value.parser
