"""What people write because `transformers.Trainer`, a shell or YAML takes it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from command_parsers import parser_of
from warm_processes import run_command

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import COMMANDS, main
from hf_msae.cli.parser import TEXTS, parse
from hf_msae.training import CheckpointError, SAETrainer, SAETrainingArguments
from hf_msae.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow

STRINGS = [
    (command, action)
    for command in COMMANDS
    for action in parser_of(command)._actions
    if action.type in (str, os.path.expanduser) and action.dest != "config"
]


def given(action, parser, value: str) -> list[str]:
    """The shortest command line that gives one argument."""
    line = []
    for other in parser._actions:
        if other.dest == action.dest:
            line += [value] if not other.option_strings else [f"{other.option_strings[0]}={value}"]
        elif not other.option_strings and other.nargs in (None, "+"):
            line += ["1"] if other.choices is None else [str(next(iter(other.choices)))]
        elif other.required:
            line += [other.option_strings[0], "1" if other.choices is None else next(iter(other.choices))]
    return line


@pytest.mark.parametrize(
    ("command", "action"), [pytest.param(c, a, id=f"{c}-{a.dest}") for c, a in STRINGS if a.choices is None]
)
def test_a_tilde_is_the_users_home_in_every_path(monkeypatch, command, action):
    monkeypatch.setenv("HOME", "/home/me")
    parser = parser_of(command)
    value = vars(parser.parse_intermixed_args(given(action, parser, "~/x")))[action.dest]
    expected = "~/x" if action.dest in TEXTS else "/home/me/x"
    assert value in (expected, [expected])


def test_a_tilde_in_yaml_and_before_the_file_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/a\ndataset: ~/b\nseparator: ~/c\nsite: [~/d]\n")
    sources, sae, training, _ = parse(parser_of("train"), ["--config", "~/run.yaml"])
    assert (training.output_dir, sources.dataset) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert (sources.separator, sae.site) == ("~/c", [f"{tmp_path}/d"])


def test_texts_are_arguments_that_exist():
    assert {action.dest for _, action in STRINGS} >= TEXTS


def test_a_tilde_in_python_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = SAETrainingArguments(output_dir="~/a", init_from="~/b", resume_from_checkpoint="~/c")
    assert (args.output_dir, args.init_from, args.resume_from_checkpoint) == ("/home/me/a", "/home/me/b", "/home/me/c")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (True, "last"),
        ("True", "last"),
        ("true", "last"),
        ("last", "last"),
        (False, None),
        (None, None),
        ("a/b", "a/b"),
    ],
)
def test_how_resuming_is_asked_for(tmp_path, written, expected):
    assert SAETrainingArguments(resume_from_checkpoint=written).resume_from_checkpoint == expected
    (tmp_path / "run.yaml").write_text(f"resume_from_checkpoint: {json.dumps(written)}\n")
    training = parse(parser_of("train"), ["--config", str(tmp_path / "run.yaml")])[2]
    assert training.resume_from_checkpoint == expected
    if isinstance(written, str):
        training = parse(parser_of("train"), ["--resume-from-checkpoint", written])[2]
        assert training.resume_from_checkpoint == expected


FIELDS = dataclasses.fields(SAETrainingArguments)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_null_is_the_default_or_none_where_none_means_something(tmp_path, field):
    (tmp_path / "run.yaml").write_text(f"{field.name}: null\n")
    value = getattr(parse(parser_of("train"), ["--config", str(tmp_path / "run.yaml")])[2], field.name)
    default = getattr(SAETrainingArguments(), field.name)
    optional = {"save_total_limit": None, "norm_outlier_multiple": None}
    assert value == optional.get(field.name, default)
    if default is not None and field.name not in optional and field.name != "report_to":
        with pytest.raises(ValueError, match=f"{field.name} must not be None"):
            SAETrainingArguments(**{field.name: None})


@pytest.fixture(scope="module")
def command(tmp_path_factory, lm, tokenizer, texts):
    folder = tmp_path_factory.mktemp("habits")
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return [
        "train", "--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--site", "layers.0",
        "--num-latents", "32", "--prefix-sizes", "8", "32", "--k", "4", "--max-steps", "3", "--batch-size", "64",
        "--block-tokens", "300", "--eval-tokens", "400", "--calibration-tokens", "200", "--ce-tokens", "0",
        "--context-length", "32", "--use-cpu", "--disable-tqdm",
    ]  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.mark.parametrize("written", ["none", "all", "tensorboard"])
def test_trackers_by_name(command, tmp_path, written):
    assert run(*command, "--output-dir", str(tmp_path), "--report-to", written) == 0
    assert (tmp_path / "trackers").exists() == (written != "none")


@pytest.mark.parametrize(
    ("written", "words"), [("aim", "pip install aim"), ("comet_ml", "pip install comet-ml"), ("wandbee", "no tracker")]
)
def test_a_tracker_that_is_not_there_is_named_first(command, tmp_path, capsys, written, words):
    assert run(*command, "--model", "/nowhere", "--output-dir", str(tmp_path), "--report-to", written) == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("written", [[], "none", ["none"], None])
def test_no_tracker_in_python(written):
    assert SAETrainingArguments(report_to=written).report_to == []


@pytest.mark.parametrize(
    ("variable", "value", "words", "bf16"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "run in bfloat16", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "give it to the command", False),
        ("ACCELERATE_MIXED_PRECISION", "no", "", False),
    ],
)
def test_what_the_launcher_is_told_is_honoured_or_said(command, tmp_path, monkeypatch, variable, value, words, bf16):
    monkeypatch.setenv(variable, value)
    status, written = run_command(1, [*command, "--output-dir", str(tmp_path / "run")], tmp_path / "output")
    assert status == 0, written
    assert written.count("From accelerate's launcher") == bool(words)
    assert words in written
    assert json.loads((tmp_path / "run" / "training_arguments.json").read_text())["bf16"] == bf16


def test_train_takes_the_checkpoint_as_in_transformers(tmp_path, lm, tokenizer, texts):
    def trainer(steps: int, resume=None):
        config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4, site="layers.0")
        args = SAETrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=64, block_tokens=300, save_steps=2,
            eval_tokens=400, calibration_tokens=200, ce_tokens=0, context_length=32, use_cpu=True, disable_tqdm=True,
            resume_from_checkpoint=resume,
        )  # fmt: skip
        return SAETrainer(lm, MatryoshkaSAE(config), args, texts, processing_class=tokenizer)

    trainer(2).train()
    with pytest.raises(CheckpointError, match="holds another run"):
        trainer(4).train()
    going_on = trainer(4)
    going_on.train(resume_from_checkpoint=True)
    assert (going_on._first_step, going_on.state.global_step) == (2, 4)
    named = trainer(6)
    named.train(resume_from_checkpoint=list_checkpoints(Path(tmp_path))[0])
    assert (named._first_step, named.state.global_step) == (2, 6)
    trainer(7, resume=True).train()
    with pytest.raises(CheckpointError, match="holds another run"):
        trainer(4, resume=True).train(resume_from_checkpoint=False)
