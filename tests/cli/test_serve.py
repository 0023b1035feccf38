"""`hf-msae serve` as a user types it, in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from patience import HANG_SECONDS

from hf_msae import MatryoshkaSAE
from hf_msae.cli.main import main
from hf_msae.serving import load_served
from hf_msae.steering import LatentEdit, Steering, save_steering

pytestmark = pytest.mark.slow

OWLS = Steering([LatentEdit(12, 2.0)], name="owls")


@pytest.fixture
def folder(untrained: Path) -> Path:
    save_steering(OWLS, untrained)
    return untrained


def test_it_answers_until_it_is_interrupted(folder):
    command = [sys.executable, "-m", "hf_msae.cli", "serve", str(folder), "--port", "0", "--api-key", "secret"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving sae, sae:owls at http://127.0.0.1:")
            client = OpenAI(base_url=line.split(" at ")[1].strip(), api_key="secret", timeout=HANG_SECONDS)
            answer = client.completions.create(model="sae:owls", prompt="Once upon", temperature=0, max_tokens=8)
            pipe = load_served(folder).pipe.with_steering(OWLS)
            expected = pipe("Once upon", return_full_text=False, temperature=0, seed=0, max_new_tokens=8)
            assert answer.choices[0].text == expected[0]["generated_text"]
            client.close()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(HANG_SECONDS) in (0, 130)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("./absent",), "There is no folder ./absent"),
        (("{sae}", "{sae}", "--port", "0"), "two of the models to serve are called 'sae'"),
        (("{sae}", "--max-running", "0"), "max_running must be a whole number from 1, got 0"),
        (("{sae}", "--model", "./absent"), "There is no model at ./absent"),
        (("{sae}", "--host", "no.such.host.invalid"), "Cannot listen at no.such.host.invalid:8000"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        main(("serve", *(argument.format(sae=folder) for argument in arguments)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_several_saes_of_one_model_are_served_together(folder, tmp_path):
    sae = MatryoshkaSAE.from_pretrained(folder)
    for name in ("a", "b"):
        sae.save_pretrained(tmp_path / "both" / name)
    loaded = {}
    both = load_served(tmp_path / "both", loaded=loaded)
    one = load_served(tmp_path / "both", subfolder="b", loaded=loaded, name="second")
    assert (both.name, sorted(both.pipe.saes), both.steerings) == ("both", ["a", "b"], {})
    assert (one.names, list(one.pipe.saes)) == (["second"], [""])
    assert one.pipe.model is both.pipe.model
