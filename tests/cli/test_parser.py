"""Flags, numbers and YAML."""

from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
from command_parsers import parser_of

from hf_msae import MatryoshkaSAEConfig
from hf_msae.cli.main import COMMANDS
from hf_msae.cli.parser import build_parser, by_place, parse
from hf_msae.cli.train import FORM_FIELDS, NOT_FLAGS, GridArguments

pytestmark = pytest.mark.slow


@dataclass
class Options:
    tokens: int = field(default=5, metadata={"help": "How many."})
    rate: float | None = field(default=None, metadata={"help": "How fast."})
    size: list[int] = field(default_factory=list, metadata={"help": "Sizes."})
    fast: bool = field(default=False, metadata={"help": "Be quick."})
    tidy: bool = field(default=True, metadata={"help": "Be tidy."})
    rows: int = field(default=1, metadata={"help": "At once.", "aliases": ["--batch-size"]})
    form: Literal["round", "square"] = field(default="round", metadata={"help": "Of what."})


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


def test_a_switch_that_is_on_has_a_flag_that_turns_it_off(tmp_path):
    assert read().tidy
    assert not read("--no-tidy").tidy
    assert not read("--no_tidy").tidy
    assert not read("--tidy", "false").tidy
    (tmp_path / "run.yaml").write_text("no-tidy: true\n")
    assert not read("--config", str(tmp_path / "run.yaml")).tidy


@pytest.mark.parametrize("key", ["rows", "batch-size", "batch_size"])
def test_aliases_are_flags_and_yaml_keys(tmp_path, key):
    assert read(f"--{key}", "3").rows == 3
    (tmp_path / "run.yaml").write_text(f"{key}: 2k\n")
    assert read("--config", str(tmp_path / "run.yaml")).rows == 2000


def test_one_argument_under_two_names_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("rows: 1\nbatch-size: 2\n")
    with pytest.raises(ValueError, match="gives rows twice, the second time as 'batch-size'"):
        read("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_is_a_yaml_key(command):
    parser = parser_of(command)
    keys = parser.keys()
    for action in parser._actions:
        for flag in action.option_strings:
            name = flag.lstrip("-").replace("-", "_")
            assert name in ("h", "help", "config", "debug") or keys[name].dest == action.dest
        assert action.dest in (*keys, "help", "config", "debug")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("--tokns", "--tokens"), ("--bach-size=3", "--batch-size"), ("--no_tdy", "--no-tidy"), ("--sizes", "--size")],
)
def test_a_mistyped_flag_is_named_with_the_nearest_one(written, meant, tmp_path):
    with pytest.raises(ValueError, match=f"there is no {written.split('=')[0]}; did you mean {meant}\\?"):
        read(written, "3")
    key = written.lstrip("-").split("=")[0]
    (tmp_path / "run.yaml").write_text(f"{key}: 3\n")
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean {meant.lstrip('-').replace('-', '_')}"):
        read("--config", str(tmp_path / "run.yaml"))


def test_what_is_like_no_flag_is_said_without_a_guess(tmp_path):
    with pytest.raises(ValueError, match=r"there is no --zzzzz\. `hf-msae try --help`"):
        read("--zzzzz")
    with pytest.raises(ValueError, match="unexpected argument 'more'"):
        read("more")


def test_a_choice_in_yaml_is_one_of_those_of_the_flag(tmp_path):
    (tmp_path / "run.yaml").write_text("form: flat\n")
    with pytest.raises(ValueError, match="form: 'flat' is none of round, square"):
        read("--config", str(tmp_path / "run.yaml"))
    (tmp_path / "run.yaml").write_text("form: square\n")
    assert read("--config", str(tmp_path / "run.yaml")).form == "square"


def test_what_must_be_given_may_be_given_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("repo: owner/name\ndir: there\n")
    (args,) = parse(parser_of("push"), ["--config", str(tmp_path / "run.yaml")])
    assert (args.dir, args.repo) == ("there", "owner/name")
    (tmp_path / "run.yaml").write_text("output_dir: there\nsite: layers.1\nmax-tokens: 1k\n")
    _, args = parse(parser_of("cache-activations"), ["--config", str(tmp_path / "run.yaml")])
    assert (args.output_dir, args.site, args.max_tokens) == ("there", ["layers.1"], 1000)


# The SAE's own flags


def test_every_field_of_the_configuration_is_a_flag_or_said_by_the_run():
    known = {item.name for item in fields(MatryoshkaSAEConfig)}
    section = MatryoshkaSAEConfig.__doc__.partition("> Where the activations come from")[2]
    said = {name for name in known if f"{name} (`" in section}
    own = {name for name, *_ in FORM_FIELDS} | NOT_FLAGS
    inherited = {item.name for item in fields(MatryoshkaSAEConfig.__mro__[1])}
    assert own <= known
    assert own & said == set()
    assert known - inherited == (own | said) - inherited


def test_flags_have_the_help_the_type_and_the_default_of_the_field():
    found = {name: (kind, item.metadata["help"]) for name, kind, item in FORM_FIELDS}
    assert found["pareto_alpha"] == (
        float | None,
        "Exponent of that draw, in (0, 1]; 1 is uniform. Default: 0.5.",
    )
    assert found["num_aux_latents"][0] == int | None
    assert found["aux_loss_weight"][1].endswith("Default: 1/32.")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("num_aux_latents", "12", 12),
        ("jumprelu_bandwidth", "0.25", 0.25),
        ("pareto_alpha", "1", 1.0),
        ("detach_prefixes", "true", True),
        ("apply_b_dec_to_input", "no", False),
        ("activation", "relu", "relu"),
        ("aux_loss_weight", "1/16", 1 / 16),
    ],
)
def test_what_is_given_of_a_form_reaches_the_configuration(flag, value, expected):
    _, args, *_ = parse(parser_of("train"), [f"--{flag.replace('_', '-')}", value])
    assert isinstance(args, GridArguments)
    grid = args.grid()
    assert grid == {"sites": [], "sites_out": [], flag: expected}
    del grid["sites"], grid["sites_out"]
    assert getattr(MatryoshkaSAEConfig(**grid), flag) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--sae", "a", "--port", "1"], ["a", "--port", "1"]),
        (["run", "--sae", "a", "b", "--sae=c", "--port", "1"], ["run", "a", "b", "c", "--port", "1"]),
        (["push", "me/page", "--title", "T", "--sae", "a"], ["push", "me/page", "a", "--title", "T"]),
        (["run", "a", "--port", "1"], ["run", "a", "--port", "1"]),
    ],
)
def test_what_a_former_flag_gives_is_put_into_its_place(given, expected, capsys):
    assert by_place("space", given) == expected
    assert ("goes with the next version" in capsys.readouterr().err) == any(one.startswith("--sae") for one in given)
