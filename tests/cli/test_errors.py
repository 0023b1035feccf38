"""Which errors become a sentence, and which keep their traceback because they are faults of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_msae.modeling.untrusted import SAEError, SAENotFoundError, SAEReplyError
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from patience import HANG_SECONDS

from hf_msae import MatryoshkaSAEConfig
from hf_msae.cli import main as cli
from hf_msae.errors import HfMsaeError, InputError, OutputExistsError
from hf_msae.training import TrainingDiverged, TrainingInterrupted

pytestmark = pytest.mark.slow


def fail(monkeypatch, capsys, raising: str, tmp_path: Path, *more: str) -> tuple[int, str]:
    """Exit code and errors of a command that raises what `raising` says."""
    (tmp_path / "failing_command.py").write_text(f"def run(arguments):\n    {raising}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_command", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("failing_command", "fails"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fail", *more])
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    "raising",
    [
        "raise ValueError('a bug')",
        "int('a bug')",
        "import torch; torch.zeros(2).view(3)",
        "import torch; torch.zeros(2) + torch.zeros(3)",
        "{}['a bug']",
        "raise TypeError('a bug')",
        "raise AssertionError('a bug')",
        "b'\\xff'.decode()",
        "import json; json.loads('{')",
        "import os; os.close(10_000)",
        "raise RuntimeError('a bug')",
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys, tmp_path, raising):
    code, errors = fail(monkeypatch, capsys, raising, tmp_path)
    assert code == 1
    assert "Traceback (most recent call last)" in errors
    assert "failing_command.py" in errors
    assert "hf-msae fail:" not in errors


@pytest.mark.parametrize(
    ("raising", "words"),
    [
        ("from hf_msae.errors import InputError; raise InputError('give more')", "give more"),
        ("from hf_msae.sites import resolve_site, SiteError; raise SiteError('no site')", "no site"),
        ("import hf_msae; hf_msae.MatryoshkaSAEConfig(k=0)", "k must be above 0"),
        ("import hf_msae; hf_msae.MatryoshkaSAE.from_pretrained('/nowhere/sae')", "/nowhere/sae"),
        ("import hf_msae; hf_msae.MatryoshkaSAE.from_pretrained('a b')", "a b"),
        ("open('/nowhere/texts.txt')", "/nowhere/texts.txt"),
        ("import pathlib; pathlib.Path('/').read_text()", "Is a directory"),
        (
            "from huggingface_hub.utils import httpx; raise httpx.ConnectError('refused')",
            "the Hub cannot be reached (refused)",
        ),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(monkeypatch, capsys, tmp_path, raising, words):
    code, errors = fail(monkeypatch, capsys, raising, tmp_path)
    assert code == 2
    assert errors.startswith("hf-msae fail: ")
    assert words in errors
    assert "Traceback" not in errors
    code, errors = fail(monkeypatch, capsys, raising, tmp_path, "--debug")
    assert code == 2
    assert "Traceback" in errors
    assert words in errors


def test_a_diverged_and_an_interrupted_run_have_exit_codes_of_their_own(monkeypatch, capsys, tmp_path):
    raising = "from hf_msae.training import TrainingDiverged; raise TrainingDiverged('NaN')"
    assert fail(monkeypatch, capsys, raising, tmp_path)[0] == 1
    raising = "from hf_msae.training import TrainingInterrupted; raise TrainingInterrupted('stopped', 143)"
    assert fail(monkeypatch, capsys, raising, tmp_path)[0] == 143


def test_old_except_clauses_still_catch():
    assert issubclass(InputError, (HfMsaeError, ValueError))
    assert issubclass(InputError, ValueError)
    assert issubclass(OutputExistsError, FileExistsError)
    assert issubclass(SAEError, ValueError)
    assert issubclass(SAENotFoundError, FileNotFoundError)
    assert issubclass(SAEReplyError, OSError)
    assert issubclass(TrainingDiverged, RuntimeError)
    assert issubclass(TrainingInterrupted, RuntimeError)
    assert cli.in_words(HFValidationError("no name")) == "no name"
    assert cli.in_words(LocalEntryNotFoundError("offline")) == "offline"
    assert cli.in_words(httpx.ReadTimeout("slow")).startswith("the Hub cannot be reached (slow)")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"a: b: c"])
def test_a_damaged_yaml_file_is_named(tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--config", str(tmp_path / "run.yaml")])
    assert caught.value.code == 2
    assert "run.yaml is no YAML file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "no-such-architecture"}, {"model_type": "gpt2", "auto_map": {"AutoConfig": "a.B"}}, []],
)
def test_a_language_model_that_transformers_cannot_read_is_a_sentence(tmp_path, capsys, config):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "texts.txt").write_text("a b c\n\nd e f\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--model", str(tmp_path / "lm"), "--dataset", str(tmp_path / "texts.txt"), "--use-cpu",
                  "--output-dir", str(tmp_path / "out")])  # fmt: skip
    errors = capsys.readouterr().err
    assert caught.value.code == 2, errors
    assert f"Cannot load the model '{tmp_path / 'lm'}'" in errors


def test_a_fault_in_a_process_of_its_own_ends_with_one(tmp_path):
    (tmp_path / "failing_command.py").write_text("def run(arguments):\n    raise ValueError('a bug')\n")
    code = "from hf_msae.cli import main as m; m.COMMANDS['fail'] = ('failing_command', ''); m.main(['fail'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=HANG_SECONDS)
    assert done.returncode == 1
    assert b"ValueError: a bug" in done.stderr


def test_a_configuration_says_what_is_wrong_with_it():
    with pytest.raises(Exception, match="k must be above 0") as caught:
        MatryoshkaSAEConfig(k=0)
    assert cli.in_words(caught.value).startswith("k must be above 0")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["tree", "--help"]])
def test_a_reader_who_leaves_ends_a_command_quietly(arguments):
    """As `hf-msae --help | head -1` does, once `head` has its line."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hf_msae.cli", *arguments]
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_of_somebody_else_that_breaks_keeps_its_traceback(monkeypatch, capsys, tmp_path):
    code, said = fail(monkeypatch, capsys, "raise BrokenPipeError(32, 'of a worker')", tmp_path)
    assert code == 1
    assert "BrokenPipeError: [Errno 32] of a worker" in said
