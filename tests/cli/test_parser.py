"""Flags, numbers and YAML."""

from dataclasses import dataclass, field

import pytest

from hf_msae.cli.parser import Collect, build_parser, parse


@dataclass
class Options:
    tokens: int = field(default=5, metadata={"help": "How many."})
    rate: float | None = field(default=None, metadata={"help": "How fast."})
    size: list[int] = field(default_factory=list, metadata={"action": Collect, "help": "Sizes."})
    fast: bool = field(default=False, metadata={"help": "Be quick."})


def read(*arguments: str) -> Options:
    (options,) = parse(build_parser("try", "Tries.", [Options]), list(arguments))
    return options


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("65_536", 65536), ("65,536", 65536), ("2k", 2000), ("500M", 500_000_000), ("1.5B", 1_500_000_000)],
)
def test_whole_numbers_as_people_write_them(text, value):
    assert read("--tokens", text).tokens == value


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1/32", 1 / 32), ("0.5", 0.5), ("2k", 2000)])
def test_numbers_as_people_write_them(text, value):
    assert read("--rate", text).rate == value


@pytest.mark.parametrize("text", ["many", "1.5", "5MM", ""])
def test_what_is_no_whole_number_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        read("--tokens", text)
    assert "number" in capsys.readouterr().err


def test_lists_grow_by_values_and_by_repetition():
    assert read("--size", "1k", "2k", "--size", "3").size == [1000, 2000, 3]
    assert read().size == []


def test_yaml_fills_and_flags_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("tokens: 2M\nsize: [1k, 5]\nfast: true\nrate: 1/4\n")
    options = read("--config", str(path), "--tokens", "3", "--size", "9")
    assert options == Options(tokens=3, rate=0.25, size=[9], fast=True)


def test_yaml_mistakes_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("tokns: 3\n")
    with pytest.raises(ValueError, match="unknown key 'tokns'"):
        read("--config", str(path))
    path.write_text("tokens: lots\n")
    with pytest.raises(ValueError, match="tokens: 'lots' is not a number"):
        read("--config", str(path))
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="`name: value` lines"):
        read("--config", str(path))
    with pytest.raises(ValueError, match="no configuration file"):
        read("--config", str(tmp_path / "absent.yaml"))


def test_help_shows_each_flag_once(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "--tokens" in text
    assert "(default: 5)" in text
    assert "default: None" not in text
