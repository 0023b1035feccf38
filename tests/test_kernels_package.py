"""The folder of kernels for Hugging Face's `kernels` library: its layout, and that it computes what torch does.

It is loaded as that library loads it, by that library too where it is installed, and its operations run on a GPU where
there is one. Without one, and with one too, they run in Triton's interpreter: `test_in_the_interpreter`.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patience import HANG_SECONDS
from torch.nn.functional import embedding_bag

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "kernels_package.py"
BUILD = "build/torch-cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (`pip install triton`)")


def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/kernels_package.py FOLDER`."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def load(file: Path, name: str) -> ModuleType:
    """A package by its file, under a name of its own, as the library loads it."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names of the script."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(script: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "sae-ops"
    script["write_package"](folder)
    return folder


def test_the_folder_holds_one_build_and_its_code_is_ours(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix != ".pyc"}
    build = {"__init__.py", "triton_ops.py", "metadata.json", "sae_ops/__init__.py"}
    assert files == {"README.md", *(f"{BUILD}/{name}" for name in build)}
    assert (folder / BUILD / "triton_ops.py").read_bytes() == (ROOT / "modeling/triton_ops.py").read_bytes()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_metadata_say_what_the_library_asks_for(folder: Path) -> None:
    metadata = json.loads((folder / BUILD / "metadata.json").read_text(encoding="utf-8"))
    assert {"name", "id", "version", "license", "python-depends", "backend"} <= set(metadata)
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
    assert (folder / BUILD / metadata["name"].replace("-", "_")).is_dir()
    assert metadata["backend"] == {"type": "cuda"}
    assert isinstance(metadata["version"], int)
    # The module's name in a process, where other versions may be, too.
    code = hashlib.sha256((folder / BUILD / "triton_ops.py").read_bytes()).hexdigest()
    assert metadata["id"].isidentifier()
    assert metadata["id"].endswith(f"_{code[:7]}")
    assert metadata["digest"]["algorithm"] == "sha256"
    assert {name: base64.b64decode(digest) for name, digest in metadata["digest"]["files"].items()} == {
        path.relative_to(folder / BUILD).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in (folder / BUILD).rglob("*.py")
    }


def test_the_code_imports_only_what_the_library_allows(folder: Path) -> None:
    """The standard library, torch, what comes with it, and by relative imports its own files."""
    for path in (folder / BUILD).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"torch", "triton"}


def test_the_card_names_version_licence_and_every_public_name(folder: Path, script: dict[str, Any]) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    assert f"version={script['VERSION']}," in card
    assert [name for name in script["PUBLIC"] if f"\n## `{name}" not in card] == []
    assert "Weighted sums (S, d), float32" in card


def test_the_same_code_gives_the_same_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, monkeypatch)  # into an empty folder
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 6
    for path in written:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_what_holds_something_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SystemExit, match="not an empty folder: give a new one"):
            command(place, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module", params=["as the library does", "by the library", "as older libraries do"])
def ops(request: pytest.FixtureRequest, folder: Path) -> ModuleType:
    """The operations, loaded from the folder."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("runs here in Triton's interpreter only (see test_in_the_interpreter), and on CUDA where it is")
    build = folder / BUILD
    if request.param == "by the library":
        # A build's own folder, because torch without CUDA takes none of a repo's.
        return pytest.importorskip("kernels").get_local_kernel(build)
    if request.param == "as the library does":
        return load(build / "__init__.py", "_sae_ops_of_a_test")
    return load(build / "sae_ops/__init__.py", "_sae_ops_of_an_old_loader")


@pytest.mark.slow
@needs_triton
def test_the_operations_are_those_of_torch(ops: ModuleType, folder: Path) -> None:
    assert Path(sys.modules[ops.segment_sum.__module__].__file__ or "").parent == folder / BUILD
    assert re.fullmatch(r"\d+\+[0-9a-f]{7}", ops.__version__)
    assert all(hasattr(ops, name) for name in ops.__all__)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 0, 300, 1])
    bags = torch.arange(4).repeat_interleave(lengths).to(DEVICE)
    offsets = (lengths.cumsum(0) - lengths).to(DEVICE)
    rows = torch.randint(9, bags.shape, generator=generator).to(DEVICE)
    table, grads, weights = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((9, 40), (4, 40), bags.shape)
    )
    sums = ops.segment_sum(table, rows, weights, offsets)
    expected = embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
    assert torch.equal(sums, ops.segment_sum(table, rows, weights, offsets))
    dots = ops.segment_dot(grads, table, rows, bags)
    torch.testing.assert_close(dots, (grads[bags] * table[rows]).sum(1), rtol=0, atol=1e-4)
    ops.check_kernels(torch.device(DEVICE))


@pytest.mark.slow
@needs_triton
def test_the_program_of_the_card_decodes(ops: ModuleType, folder: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in program.splitlines() if "get_kernel" not in line]
    assert len(program.splitlines()) == len(lines) + 2
    known = {"sae_ops": ops}
    exec("\n".join(lines).replace('device="cuda"', f'device="{DEVICE}"'), known)
    pre, W_dec, found = (known[name] for name in ("pre", "W_dec", "reconstruction"))
    assert known["total"] > 0
    torch.testing.assert_close(found, torch.where(pre > 2.5, pre, 0) @ W_dec, rtol=0, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.slow
@needs_triton
def test_in_the_interpreter() -> None:
    """Every check above, without a GPU."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for way in ("as the library does", "as older libraries do"):
        assert f"::test_the_operations_are_those_of_torch[{way}] PASSED" in run.stdout
        assert f"::test_the_program_of_the_card_decodes[{way}] PASSED" in run.stdout
