"""A checkpoint works where hf_msae is not installed: the code beside the weights is all a reader needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_msae.modeling
import pytest
import torch
from patience import HANG_SECONDS
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

pytestmark = pytest.mark.slow

SOURCE = Path(hf_msae.modeling.__file__).parent
PREFIX = 8

# Runs in another process, with the checkpoint's folder and an empty one as arguments.
READER = """
import io, json, pickle, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_msae", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

torch.set_num_threads(1)
checkpoint, out = map(Path, sys.argv[1:])
# A copy begins where tensors usually do: the last bit of a matrix product depends on that.
x = load_file(out / "x.safetensors")["x"].clone()
facts = {}

try:
    import hf_msae
except ModuleNotFoundError as error:
    facts["import"] = str(error)
try:
    AutoModel.from_pretrained(checkpoint, trust_remote_code=False)
except ValueError as error:
    facts["untrusted"] = str(error)

def remote(folder, **arguments):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **arguments)

config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
facts["config"] = [type(config).__name__, config.prefix_sizes, config.d_sae]
sae = remote(checkpoint)
facts["class"] = [type(sae).__name__, type(sae).__module__.split(".")[0], sae.training]
cut = remote(checkpoint, prefix=int(facts["config"][1][0]))
sae.save_pretrained(out / "again")
facts["files"] = sorted(path.name for path in (out / "again").iterdir())
again = remote(out / "again")
buffer = io.BytesIO(pickle.dumps(again))
with torch.no_grad():
    latents = sae.encode(x)
    results = {
        "latents": latents,
        "decoded": sae.decode(latents),
        "levels": sae(x).level_losses,
        "threshold": sae.threshold,
        "prefix latents": cut.encode(x),
        "prefix decoded": cut.decode(cut.encode(x)),
        "latents again": again.encode(x),
        "latents unpickled": pickle.load(buffer).encode(x),
    }
try:
    remote(checkpoint, prefix=10_000)
except ValueError as error:
    facts["refused"] = str(error)
save_file({name: tensor.contiguous() for name, tensor in results.items()}, out / "results.safetensors")
facts["modules"] = [name for name in sys.modules if name.split(".")[0] in ("hf_msae", "modeling")]
(out / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=12, num_latents=40, prefix_sizes=[PREFIX, 16, 40], k=4))
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        sae.max_activation.uniform_()
    sae.calibrate_threshold([torch.randn(500, 12)])
    return sae.eval()


@pytest.fixture(scope="module")
def checkpoint(sae: MatryoshkaSAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    sae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def read_elsewhere(checkpoint: Path, activations: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a process without hf_msae filled after reading the checkpoint."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file({"x": activations}, folder / "x.safetensors")
    # Its own cache of remote code, so that no earlier copy of the files can stand in for the checkpoint's.
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", READER, str(checkpoint), str(folder)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def facts(read_elsewhere: Path) -> dict:
    return json.loads((read_elsewhere / "facts.json").read_text())


@pytest.fixture(scope="module")
def results(read_elsewhere: Path) -> dict[str, torch.Tensor]:
    return load_file(read_elsewhere / "results.safetensors")


def test_a_checkpoint_takes_its_code_along(checkpoint: Path) -> None:
    files = {path.name for path in checkpoint.iterdir()}
    code = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    assert {"configuration_matryoshka_sae.py", "modeling_matryoshka_sae.py", "dense_ops.py", "sparse_ops.py"} <= code
    assert files == code | {"config.json", "model.safetensors"}
    for name in code:
        assert (checkpoint / name).read_text() == (SOURCE / name).read_text()
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_matryoshka_sae.MatryoshkaSAEConfig",
        "AutoModel": "modeling_matryoshka_sae.MatryoshkaSAE",
    }


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_the_code_imports_nothing_that_a_reader_lacks(path: Path) -> None:
    """transformers refuses remote code whose imports it cannot find, and copies only `from .name import` along."""
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    assert set(get_imports(path)) <= allowed - {"__future__"}
    for name in get_relative_imports(path):
        assert (SOURCE / f"{name}.py").is_file()


def test_the_reader_really_lacked_hf_msae(facts: dict) -> None:
    assert facts["import"] == "No module named 'hf_msae'"
    assert facts["modules"] == []
    assert "trust_remote_code=True" in facts["untrusted"]


def test_the_reader_loads_the_class_beside_the_weights(facts: dict) -> None:
    assert facts["class"] == ["MatryoshkaSAE", "transformers_modules", False]
    assert facts["config"] == ["MatryoshkaSAEConfig", [PREFIX, 16, 40], 40]


def test_the_reader_computes_the_same(
    sae: MatryoshkaSAE, activations: torch.Tensor, results: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        latents = sae.encode(activations)
        assert torch.equal(results["latents"], latents)
        assert torch.equal(results["decoded"], sae.decode(latents))
        assert torch.equal(results["levels"], sae(activations).level_losses)
    assert torch.equal(results["threshold"], sae.threshold)
    assert 0 < int((latents > 0).sum()) < latents.numel() / 2


def test_the_reader_can_read_a_prefix(
    sae: MatryoshkaSAE, activations: torch.Tensor, results: dict[str, torch.Tensor], facts: dict
) -> None:
    with torch.no_grad():
        latents = sae.encode(activations, prefix=PREFIX)
        assert torch.equal(results["prefix latents"], latents)
        assert torch.equal(results["prefix decoded"], sae.decode(latents))
    assert "from 1 to num_latents=40, got 10000" in facts["refused"]


def test_what_the_reader_saves_is_a_checkpoint_again(
    checkpoint: Path, read_elsewhere: Path, results: dict[str, torch.Tensor], facts: dict
) -> None:
    assert torch.equal(results["latents again"], results["latents"])
    assert torch.equal(results["latents unpickled"], results["latents"])
    assert facts["files"] == sorted(path.name for path in checkpoint.iterdir())
    again = read_elsewhere / "again"
    for path in checkpoint.glob("*.py"):
        assert (again / path.name).read_text() == path.read_text()
    loaded, original = MatryoshkaSAE.from_pretrained(again), MatryoshkaSAE.from_pretrained(checkpoint)
    assert loaded.config.normalized_level_weights == original.config.normalized_level_weights
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
