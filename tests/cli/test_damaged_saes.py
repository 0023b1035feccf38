"""A damaged SAE is one sentence and exit code 2, whichever command is given it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm_processes import run_command

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main

pytestmark = pytest.mark.slow

LATENTS, HIDDEN = 64, 128
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An untrained SAE of the story model."""
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(
        hidden_size=HIDDEN, num_latents=LATENTS, prefix_sizes=[16, LATENTS], k=4, site="layers.2", base_model="stories"
    )
    folder = tmp_path_factory.mktemp("whole") / "sae"
    MatryoshkaSAE(config).save_pretrained(folder)
    return folder


def config_with(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(text) and None


def weights_with(**changes: torch.Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS) | changes
        (folder / WEIGHTS).unlink()
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def header(length: int, text: bytes = b"") -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text) and None


def absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def directory(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def index_of(name: str) -> Callable[[Path], None]:
    """An index that names a file which is there, outside the folder or not."""

    def damage(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "config is no JSON": config_text("{"),
    "config is nested deeply": config_text("[" * 100_000),
    "config is a list": config_text("[]"),
    "config of wrong types": config_with(num_latents="many"),
    "config of huge sizes": config_with(num_latents=2**40, prefix_sizes=[2**40]),
    "config of another size": config_with(num_latents=2 * LATENTS, prefix_sizes=[2 * LATENTS]),
    "config with a number of no end": config_with(k=float("nan")),
    "weights are truncated": truncated,
    "weights of a huge header": header(2**60),
    "weights with a header that is no JSON": header(4, b"[[[["),
    "weights of NaN": weights_with(W_dec=torch.full((LATENTS, HIDDEN), torch.nan)),
    "weights of whole numbers": weights_with(W_enc=torch.ones(LATENTS, HIDDEN, dtype=torch.int8)),
    "maxima below zero": weights_with(max_activation=torch.full((LATENTS,), -1.0)),
    "weights are missing": absent,
    "weights are a directory": directory,
    "index leads outside": index_of("../outside.safetensors"),
    "index names what is not there": index_of("model-00001-of-00001.safetensors"),
}
COMMANDS: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "eval": lambda sae, out: ("eval", sae, "--output-dir", out),
    "interpret": lambda sae, out: ("interpret", sae, "--output-dir", out),
    "tree": lambda sae, out: ("tree", sae),
    "steer": lambda sae, out: ("steer", sae, "--prompt", "A boy", "--latent", "1=2"),
    "convert": lambda sae, out: ("convert", sae, out),
    "convert to SAELens": lambda sae, out: ("convert", sae, out, "--to", "saelens"),
    "convert a prefix": lambda sae, out: ("convert", sae, out, "--prefix", "16"),
    "push": lambda sae, out: ("push", sae, "tester/damaged"),
    "meta": lambda sae, out: ("meta", sae, "--output-dir", out),
    "space": lambda sae, out: ("space", "run", sae),
}
# The Space opens weights when its page is there, so that only what a configuration says can end it before.
OF_CONFIG = tuple(kind for kind in DAMAGE if kind.startswith("config") and kind != "config of another size")


def check_words(printed: str, command: str) -> None:
    """One sentence or two that begin with the command, the hint, and no traceback."""
    lines = [line for line in printed.splitlines() if line and not line.startswith(("WARNING", "INFO"))]
    assert "Traceback" not in printed
    assert lines[-2].startswith(f"hf-msae {command}: "), printed
    assert lines[-1] == "(--debug shows where this came from)"
    assert 40 < len(lines[-2]) < 900


@pytest.mark.parametrize(
    ("kind", "command"),
    [(kind, command) for kind in DAMAGE for command in COMMANDS if command != "space" or kind in OF_CONFIG],
)
def test_a_damaged_sae_is_one_sentence_from_every_command(whole, hub, tmp_path, capfd, kind, command):
    folder = tmp_path / "sae"
    shutil.copytree(whole, folder)
    DAMAGE[kind](folder)
    with pytest.raises(SystemExit) as caught:
        main(COMMANDS[command](str(folder), str(tmp_path / "out")))
    check_words(capfd.readouterr().err, COMMANDS[command]("", "")[0])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
    assert "tester/damaged" not in str([request.path for request in hub.requests if request.method == "POST"])


@pytest.mark.parametrize("kind", ["config is nested deeply", "weights are truncated"])
def test_a_process_of_its_own_ends_the_same_way(whole, tmp_path, kind):
    shutil.copytree(whole, tmp_path / "sae")
    DAMAGE[kind](tmp_path / "sae")
    status, printed = run_command(1, ["convert", str(tmp_path / "sae"), str(tmp_path / "out")], tmp_path / "printed")
    assert status == 2
    check_words(printed, "convert")


@pytest.mark.parametrize("name", ["training_arguments.json", "metrics.json"])
@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"learning_rate": [], "training_tokens": "x"}', '{"training_tokens": [3]}']
)
def test_a_damaged_record_of_a_run_is_one_sentence(whole, tmp_path, capfd, name, text):
    """Baselines are trained as the SAE was, which these two files say."""
    shutil.copytree(whole, tmp_path / "sae")
    (tmp_path / "sae" / "metrics.json").write_text('{"training_tokens": 5000}')
    (tmp_path / "sae" / "training_arguments.json").write_text("{}")
    (tmp_path / "sae" / name).write_text(text)
    if "training_tokens" in text:
        (tmp_path / "sae" / "training_arguments.json").write_text('{"learning_rate": []}')
    with pytest.raises(SystemExit) as caught:
        main(("eval", str(tmp_path / "sae"), "--output-dir", str(tmp_path / "out"), "--baselines", "batch_topk"))
    check_words(capfd.readouterr().err, "eval")
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["interpret", "steer", "tree", "convert"])
def test_a_subfolder_that_leads_outside_is_one_sentence(whole, tmp_path, capfd, command):
    (whole / "below").mkdir(exist_ok=True)
    given = {
        "interpret": ("interpret", str(whole / "below")),
        "steer": ("steer", str(whole / "below"), "--prompt", "A boy"),
        "tree": ("tree", str(whole / "below")),
        "convert": ("convert", str(whole / "below"), str(tmp_path / "out")),
    }[command]
    with pytest.raises(SystemExit) as caught:
        main((*given, "--subfolder", ".."))
    printed = capfd.readouterr().err
    check_words(printed, command)
    assert "must be a path below" in printed
    assert caught.value.code == 2
