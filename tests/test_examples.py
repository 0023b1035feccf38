"""The examples run, at sizes that are too small to find anything, and print what they say they print."""

import ast
import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from command_parsers import parser_of
from documents import run_examples, run_notebook
from warm_processes import run_together

from hf_msae.cli.parser import parse
from hf_msae.cli.train import GridArguments
from hf_msae.training import make_saes
from hf_msae.worlds.stories import load_story_lm

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.yaml"))
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
JOB = [
    *("--output-dir", "runs/job", "--num-latents", "64", "--k", "4", "--batch-size", "256", "--max-steps", "6"),
    *("--save-steps", "4", "--eval-tokens", "600", "--calibration-tokens", "400", "--disable-tqdm"),
    *("--ce-tokens", "0", "--block-tokens", "2k"),
]
# In the order in which a reader runs them.
COMMANDS = [
    ["train.py", "--max-tokens", "30000"],
    ["load_prefix.py"],
    ["interpret.py", "--max-tokens", "20000"],
    ["steer.py", "--strengths", "1"],
    ["evaluate.py", "--eval-tokens", "5000", "--metrics", "core", "geometry"],
    ["serve.py", "--strengths", "4"],
    ["transcode.py", "--max-tokens", "30000"],
    # The same job twice: the second goes on from the checkpoint that the first left.
    ["jobs.py", *JOB],
    ["jobs.py", *JOB],
]


def test_every_example_runs(tmp_path: Path) -> None:
    assert sorted({command[0] for command in COMMANDS}) == SCRIPTS
    commands = [[str(EXAMPLES / script), *arguments] for script, *arguments in COMMANDS]
    status, printed = run_together(1, run_examples, str(tmp_path), commands, output=tmp_path / "out")
    assert status == 0, printed[-4000:]
    of = {part.split()[0]: part for part in printed.split("$ ")[1:]}
    assert re.search(r"first 1,024 latents: L0 [678]\.\d, variance explained 0\.\d{3}", of["train.py"])
    assert "128 of 1,024 latents were read" in of["load_prefix.py"]
    assert re.search(r"the first 1,024: \d+\.\d active a token, explain -?\d+\.\d%", of["load_prefix.py"])
    assert re.search(r"latent \d+ promotes 'angry'; it fires on |below \d+ \(", of["interpret.py"])
    assert of["steer.py"].count("It was a cold day, and Ben was very") == 2
    assert "angry-1.0" in (tmp_path / "runs/example/steering.json").read_text()
    assert "random" in of["evaluate.py"]
    unsteered, steered = re.findall(r"^[04]:.+$", of["serve.py"], re.MULTILINE)
    assert unsteered[1:] != steered[1:]
    assert re.search(
        r"first 1,024 latents: \d\d\.\d% of the MLP's output, -?\d+\.\d% of the cross", of["transcode.py"]
    )
    assert "layers.2.mlp:input, writes model.layers.2.mlp" in of["transcode.py"].replace(".input", ":input")
    assert (tmp_path / "runs/transcoder/circuit-tracer").is_dir()
    assert "the run goes on from the newest" in of["jobs.py"]
    assert printed.count("has checkpoints") == 1
    assert (tmp_path / "runs/example/evaluation/report.html").is_file()


def test_the_notebook_runs_and_holds_no_outputs(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    smaller = "block_tokens=30_000"  # by default a quarter of a million tokens are read before the first step
    changes = {
        "MAX_TOKENS = 1_000_000": "MAX_TOKENS = 30_000",
        "max_tokens=MAX_TOKENS,": f"max_tokens=MAX_TOKENS, {smaller},",
    }
    notebook = str(EXAMPLES / "tour.ipynb")
    status, printed = run_together(1, run_notebook, str(tmp_path), notebook, changes, output=tmp_path / "out")
    assert status == 0, printed[-4000:]
    assert printed.count("It was a cold day, and Ben was very") == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_file_of_settings_is_one_of_the_command_that_it_names(path: Path) -> None:
    """Its flags exist, and the SAEs that it asks for are possible."""
    first = re.search(r"hf-msae (\S+) --config (\S+)", path.read_text(encoding="utf-8"))
    assert first is not None, "its first lines name its command"
    assert EXAMPLES.parent / first[2] == path
    for values in parse(parser_of(first[1]), ["--config", str(path)]):
        if isinstance(values, GridArguments):
            make_saes(load_story_lm()[0], **dataclasses.replace(values, site=[]).grid())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_and_its_first_lines_name_flags_that_it_has(script: str) -> None:
    source = (EXAMPLES / script).read_text()
    assert source.count("\n") <= 50
    first_lines = ast.get_docstring(ast.parse(source)) or ""
    commands = re.findall(rf"^ *(python examples/{script}.*)$", first_lines, re.MULTILINE)
    assert len(commands) >= 2
    flags = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    assert "--model" in flags
    words = [word for command in commands for word in shlex.split(command.split("  ")[0])]
    assert {word for word in words if word.startswith("--")} <= flags


def test_the_real_models_articles_are_taken_apart_and_put_together(tmp_path: Path) -> None:
    """WikiText marks what its tokenizer took apart."""
    articles = runpy.run_path(str(EXAMPLES / "smollm2" / "prepare.py"))["articles"]
    path = tmp_path / "wiki.txt"
    path.write_text(
        ' \n = Owl = \n \n The owl ( a bird ) eats 1 @,@ 000 mice , " it is said " . \n \n = = Food = = \n'
        " It does n't eat well @-@ known mice . \n \n = Lynx ( cat ) = \n \n Its owner 's cat . \n"
    )
    assert [article for article in articles([str(path)]) if article] == [
        '= Owl =\nThe owl (a bird) eats 1,000 mice, "it is said".\n= = Food = =\nIt doesn\'t eat well-known mice.',
        "= Lynx (cat) =\nIts owner's cat.",
    ]
