"""What a user installs: the wheel, the sdist, the zip of the tree; and the floors that files may import from.

Installed copies are tried in processes without `site`, so that no editable install can stand in for them.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from patience import HANG_SECONDS

pytestmark = pytest.mark.slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The floor of each room: a file imports only from its own room or from floors below.
FLOORS = {
    "hf_msae.errors": -1,  # the ground itself raises them
    "hf_msae.importing": -1,
    "hf_msae.atomic_files": 0,
    "hf_msae.devices": 0,
    "hf_msae.outliers": 0,
    "hf_msae.moved": 0,
    "hf_msae.plot_style": 0,
    "hf_msae.process_wide": 0,
    "hf_msae.reading_fields": 0.5,  # it says what outliers are left out
    "hf_msae.special_tokens": 0,
    "hf_msae.model_names": 1.1,  # it knows the story model
    "hf_msae.quantization": 1.1,  # it knows what SAEs record
    "hf_msae.adapters": 1.2,
    "hf_msae.language_models": 1.5,
    "hf_msae.modeling": 1,
    "hf_msae.sites": 1,
    "hf_msae.worlds": 1,
    "hf_msae.data": 2,
    "hf_msae.formats": 2,
    "hf_msae.hub": 2,
    "hf_msae.metrics": 2,
    "hf_msae.cross_entropy": 2.5,  # of the numbers of `metrics.py` those that need the language model
    "hf_msae.shared_caches": 2.5,  # caches of `data`, on the `hub`
    "hf_msae.steering": 2,
    "hf_msae.training": 3,
    "hf_msae.evaluation": 3,
    "hf_msae.interpret": 3,
    "hf_msae.serving": 3,
    "hf_msae.concepts": 4,
    "hf_msae.corpora": 4,
    "hf_msae.research": 4,
    "hf_msae.cli": 5,
}
# Rooms of one floor that may see each other all the same.
NEIGHBOURS = {
    (
        "hf_msae.formats",
        "hf_msae.interpret",
    ): "types alone: Neuronpedia shows an interpretation's pages",
    ("hf_msae.sites", "hf_msae.modeling"): "types alone: an SAE's configuration says where it reads",
    ("hf_msae.hub", "hf_msae.formats"): "a repo without an SAE of ours may hold another library's",
    ("hf_msae.hub", "hf_msae.metrics"): "a model card shows the table of a measurement",
    ("hf_msae.evaluation", "hf_msae.training"): "baselines, toys and meta-SAEs are trained as any SAE is",
}
# Where the sources of the package lie, and where they are installed. The Space is run as a script, never imported.
HOMES = {"hf_msae": "hf_msae", "modeling": "hf_msae/modeling", "spaces/steering": "hf_msae/space"}
SCRIPT = "spaces/steering"
# What a checkpoint's reader has: the files of modeling/ lie beside every checkpoint.
OF_A_READER = {"torch", "transformers", "safetensors", "huggingface_hub"}
# What some machines lack: imported only by the functions that need it.
LAZY = {"datasets", "fastapi", "gguf", "gradio", "uvicorn"}

# Runs where only an installed copy is hf_msae, as on a machine that lacks the LAZY packages; prints facts as JSON.
TRIAL = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
import importlib, json, pkgutil
from importlib.metadata import version
from pathlib import Path
import hf_msae
import torch

names = [m.name for m in pkgutil.walk_packages(hf_msae.__path__, "hf_msae.") if not m.name.endswith("__main__")]
modules = [hf_msae, *map(importlib.import_module, names)]
from hf_msae.hub.card import TEMPLATE
from hf_msae.worlds.stories import load_story_lm

torch.manual_seed(0)
sae = hf_msae.MatryoshkaSAE(hf_msae.MatryoshkaSAEConfig(hidden_size=8, num_latents=32, prefix_sizes=[8, 32], k=4))
sae.save_pretrained(Path(sys.argv[1]))
again = hf_msae.MatryoshkaSAE.from_pretrained(Path(sys.argv[1]))
x = torch.randn(5, 8)
model, tokenizer = load_story_lm()
print(json.dumps({
    "files": [m.__file__ for m in modules],
    "versions": [hf_msae.__version__, version("hf-msae")],
    "editable": [name for name in sys.modules if name.startswith("__editable__")],
    "saved": sorted(path.name for path in Path(sys.argv[1]).iterdir()),
    "same": torch.equal(again.encode(x), sae.eval().encode(x)),
    "active": int((again.encode(x) > 0).sum()),
    "template": TEMPLATE.read_text(),
    "story tokens": tokenizer("the owl").input_ids,
    "story logits": list(model(**tokenizer("the owl", return_tensors="pt")).logits.shape),
}))
"""


# Building and installing


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a process; its output is in the error where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def copy_tree(folder: Path) -> None:
    """The files that git tracks or would add; without git, the checkout less what builds and runs leave in it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        leavings = (".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*leavings))
        return
    # A checkout that another user owns, as in a container, is read like any other.
    git = ("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in run(*git, cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():  # a file that was deleted, but is not committed as such, is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout; builds leave things behind, so they take copies of it."""
    folder = tmp_path_factory.mktemp("tree") / "hf_msae-main"
    copy_tree(folder)
    return folder


def build(tree: Path, out: Path, *options: str) -> Path:
    """The folder with what `python -m build` made of a copy of the tree."""
    copy = shutil.copytree(tree, out / "tree")
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out / "dist", copy, cwd=out)
    return out / "dist"


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tree."""
    (path,) = build(tree, tmp_path_factory.mktemp("wheel"), "--wheel").iterdir()
    return path


def install(source: Path, folder: Path) -> Path:
    """A folder that holds an installed copy and nothing else."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "install", *options, "--target", folder, source, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("from_wheel") / "target")


def run_installed(target: Path, *command: str | Path, cwd: Path) -> str:
    """Runs Python with the target and the environment's packages; without `site`, no .pth file is read."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return run(sys.executable, "-S", *command, cwd=cwd, PYTHONPATH=os.pathsep.join([str(target), *packages]))


def contents(archive: Path) -> dict[str, int]:
    """The files of a wheel and their checksums."""
    with zipfile.ZipFile(archive) as opened:
        return {info.filename: info.CRC for info in opened.infolist()}


def check_installed(target: Path, tmp_path: Path) -> None:
    facts = json.loads(run_installed(target, "-c", TRIAL, tmp_path / "sae", *LAZY, cwd=tmp_path))
    # Without `__main__`, which is a command.
    expected = {path for path in (target / "hf_msae").rglob("*.py") if path.name != "__main__.py"}
    space = set((target / HOMES[SCRIPT]).rglob("*.py"))
    assert target / HOMES[SCRIPT] / "app.py" in space
    assert {Path(name) for name in facts["files"]} == expected - space
    assert facts["versions"] == [PROJECT["project"]["version"]] * 2
    assert facts["editable"] == []
    assert {"config.json", "model.safetensors", "modeling_matryoshka_sae.py"} <= set(facts["saved"])
    assert facts["same"]
    assert facts["active"] > 0
    assert facts["template"] == (ROOT / "hf_msae/hub/model_card.md").read_text()
    assert facts["story logits"][:2] == [1, len(facts["story tokens"])]


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path, tree: Path) -> None:
    expected = {
        f"{home}/{path.relative_to(tree / top).as_posix()}"
        for top, home in HOMES.items()
        for path in (tree / top).rglob("*")
        if path.is_file()
    }
    shipped = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert shipped == expected
    needed = {"py.typed", "hub/model_card.md", "modeling/modeling_matryoshka_sae.py"}
    lm = {f"worlds/stories/story-lm/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert {f"hf_msae/{name}" for name in needed | lm} <= shipped


def test_the_wheel_says_what_it_is(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        info = next(name.split("/")[0] for name in opened.namelist() if ".dist-info/" in name)
        metadata, _, description = opened.read(f"{info}/METADATA").decode().partition("\n\n")
        assert opened.read(f"{info}/licenses/LICENSE") == (tree / "LICENSE").read_bytes()
        assert "hf-msae = hf_msae.cli.main:main" in opened.read(f"{info}/entry_points.txt").decode()
    lines = metadata.splitlines()
    assert {"Name: hf-msae", "License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(lines)
    assert f"Requires-Python: {PROJECT['project']['requires-python']}" in lines
    assert description.strip() == (tree / "README.md").read_text().strip()


def test_the_sdist_builds_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path) -> None:
    """Without options, `python -m build` makes the sdist, and the wheel from the sdist."""
    dist = build(tree, tmp_path)
    (rebuilt,) = dist.glob("*.whl")
    assert len(list(dist.glob("*.tar.gz"))) == 1
    assert rebuilt.name == wheel.name
    assert contents(rebuilt) == contents(wheel)


def test_an_installed_wheel_works(from_wheel: Path, tmp_path: Path) -> None:
    check_installed(from_wheel, tmp_path)


def test_the_installed_command_works(from_wheel: Path, tmp_path: Path) -> None:
    script = from_wheel / "bin" / "hf-msae"
    assert run_installed(from_wheel, script, "--version", cwd=tmp_path) == f"{PROJECT['project']['version']}\n"


def test_an_installed_copy_stands_aside_for_a_checkout(from_wheel: Path, tree: Path, tmp_path: Path) -> None:
    """Python started in a checkout's root finds the folder hf_msae/ first, wherever the model and the Space lie."""
    model = tree / "modeling" / "__init__.py"
    code = "import hf_msae.modeling, hf_msae.hub.spaces as s; print(hf_msae.modeling.__file__, s.space_folder())"
    code += "; import multiprocessing as m; pool = m.get_context('spawn').Pool(1)"
    code += "; print(pool.apply(hf_msae.MatryoshkaSAEConfig).__module__)"
    found = run_installed(from_wheel, "-c", code, cwd=tree).split()
    assert found[:2] == [str(model), str(tree / "spaces" / "steering")]
    assert found[2:] == ["hf_msae.modeling.configuration_matryoshka_sae"]
    version = PROJECT["project"]["version"]
    assert run_installed(from_wheel, "-m", "hf_msae.cli", "--version", cwd=tree) == f"{version}\n"
    assert "--prefix-sizes" in run_installed(from_wheel, "-m", "hf_msae.cli", "train", "--help", cwd=tree)
    # Importing the model would be the same again, and takes seconds.
    (tmp_path / "test_it.py").write_text(
        "import hf_msae, importlib.util\n\n"
        f"def test_it():\n    assert importlib.util.find_spec('hf_msae.modeling').origin == {str(model)!r}\n"
    )
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", tmp_path)
    assert "1 passed" in run_installed(from_wheel, "-m", "pytest", *options, tmp_path / "test_it.py", cwd=tree)


def test_an_installed_copy_has_the_space(from_wheel: Path, tmp_path: Path) -> None:
    code = "from hf_msae.hub.spaces import space_folder; print(space_folder())"
    folder = Path(run_installed(from_wheel, "-c", code, cwd=tmp_path).strip())
    assert folder == from_wheel / HOMES[SCRIPT]
    sources = {
        path.relative_to(ROOT / SCRIPT) for path in (ROOT / SCRIPT).rglob("*") if path.suffix in (".py", ".css")
    }
    assert {path for path in sources if not (folder / path).is_file()} == set()


def installed_files(target: Path) -> dict[str, bytes]:
    """Every file of an installed copy, less what says where it came from and what Python compiled."""
    files = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    passing = ("__pycache__", "direct_url.json", "RECORD")
    return {name: path.read_bytes() for name, path in files.items() if not any(word in name for word in passing)}


def test_a_zip_of_the_tree_installs_the_same_files(from_wheel: Path, tree: Path, tmp_path: Path) -> None:
    """As GitHub serves it, with one folder at its top; that these files work is tested above."""
    archive = shutil.make_archive(str(tmp_path / "HEAD"), "zip", tree.parent, tree.name)
    files = installed_files(install(Path(archive), tmp_path / "target"))
    assert "hf_msae/modeling/modeling_matryoshka_sae.py" in files
    assert files == installed_files(from_wheel)


def test_every_folder_of_code_is_a_listed_package() -> None:
    """setuptools is given the packages by name; one that nobody lists is silently left out of the wheel."""
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {(top, path.parent) for top in HOMES for path in (ROOT / top).rglob("*.py")}
    assert [folder for _, folder in folders if not (folder / "__init__.py").is_file()] == [ROOT / SCRIPT]
    assert {name: folder for folder, name in HOMES.items()} == {
        name.replace(".", "/"): folder for name, folder in setuptools["package-dir"].items()
    }
    names = {Path(HOMES[top], folder.relative_to(ROOT / top)).as_posix().replace("/", ".") for top, folder in folders}
    assert names == set(setuptools["packages"])
    assert len(setuptools["packages"]) == len(names)


# Floors


class Import(NamedTuple):
    """One name that a file imports, as written out in full.

    `lazy` where it stands inside a function, `for_types` where it is read by type checkers and never run.
    """

    name: str
    lazy: bool
    for_types: bool = False


def read_imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a file that lies in `package`; `from a import b` gives a.b, a module or not."""

    def visit(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", lazy, for_types) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = for_types or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, for_types)

    return visit(ast.parse(source), False, False)


@cache
def read_package() -> dict[str, list[Import]]:
    """Every module of the package, by the name under which it is imported, and what it imports."""
    modules = {}
    for top in HOMES.keys() - {SCRIPT}:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = [*(["hf_msae"] if top == "modeling" else []), *path.relative_to(ROOT).with_suffix("").parts]
            package = ".".join(parts[:-1])
            name = package if parts[-1] == "__init__" else ".".join(parts)
            modules[name] = list(read_imports(path.read_text(), package))
    return modules


def module_of(name: str) -> str:
    """The module of this package that an imported name is or lies in."""
    return name if name in read_package() else name.rpartition(".")[0]


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def own_imports() -> Iterator[tuple[str, str]]:
    """Pairs of a module and a module of this package that it imports."""
    for module, imports in read_package().items():
        for name, *_ in imports:
            if name.split(".")[0] == "hf_msae":
                yield module, module_of(name)


def third_party_imports() -> Iterator[tuple[str, str, bool]]:
    """A module, the top-level name of a package it imports, and whether it does so inside a function."""
    for module, imports in read_package().items():
        for name, lazy, for_types in imports:
            top = name.split(".")[0]
            if not for_types and top not in sys.stdlib_module_names | {"hf_msae"}:
                yield module, top, lazy


def test_imports_are_read_as_python_reads_them() -> None:
    source = (
        "import a.b as c\nfrom . import d\nfrom ..e import f\nclass X:\n  def g(self):\n    from datasets import h\n"
    )
    assert list(read_imports(source, "hf_msae.worlds.stories")) == [
        Import("a.b", False),
        Import("hf_msae.worlds.stories.d", False),
        Import("hf_msae.worlds.e.f", False),
        Import("datasets.h", True),
    ]


def test_every_file_lies_in_a_room() -> None:
    assert {room_of(module) for module in read_package()} - {"hf_msae"} <= set(FLOORS)


def test_files_import_only_from_their_own_room_and_from_floors_below() -> None:
    """`hf_msae/__init__.py` is the front door: it may show any room, and no room goes out through it."""
    pairs = {(room_of(module), room_of(imported)) for module, imported in own_imports()}
    across = {(room, other) for room, other in pairs if room not in (other, "hf_msae")}
    upward = {(room, other) for room, other in across if FLOORS[room] <= FLOORS.get(other, 6)}
    assert upward == set(NEIGHBOURS), "an import goes up or sideways, or an exception is no longer needed"
    assert ("hf_msae.training", "hf_msae.modeling") in across


def test_no_imports_go_round_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in own_imports():
        graph.setdefault(module, set()).add(imported)
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("hf_msae.sites") < order.index("hf_msae.data.stream") < order.index("hf_msae.training.trainer")


KERNELS = {"hf_msae.modeling.triton_ops", "hf_msae.modeling.triton_rows"}


def test_the_model_imports_only_what_every_reader_has() -> None:
    model = [module for module in read_package() if room_of(module) == "hf_msae.modeling"]
    own = {room_of(imported) for module, imported in own_imports() if module in model}
    others = {name for module, name, _ in third_party_imports() if module in model and module not in KERNELS}
    assert own == {"hf_msae.modeling"}
    assert {"torch", "transformers"} <= others <= OF_A_READER
    assert {name for module, name, _ in third_party_imports() if module in KERNELS} == {"torch", "triton"}


def test_what_some_machines_lack_is_imported_only_where_it_is_used() -> None:
    found = {(name, lazy) for _, name, lazy in third_party_imports() if name in LAZY}
    assert ("datasets", True) in found
    assert {(module, name) for module, name, lazy in third_party_imports() if name in LAZY and not lazy} == set()


def test_what_modules_import_is_declared() -> None:
    """A package that comes along with another today may not tomorrow."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    optional = {canonicalize_name(Requirement(line).name) for extra in extras for line in extra}
    owners = packages_distributions()
    for module, name, lazy in third_party_imports():
        # The kernels are imported inside functions, where Triton is known to be present.
        allowed = declared | optional if lazy or module in KERNELS else declared
        assert {canonicalize_name(owner) for owner in owners.get(name, [name])} & allowed, f"{module} imports {name}"


def test_files_are_read_and_written_in_an_encoding_that_is_named() -> None:
    """The linter sees this only where it knows that something is a path."""
    tops = ("hf_msae", "modeling", "spaces", "benchmarks", "scripts", "examples")
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for top in tops
        for path in (ROOT / top).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and len(call.args) == (call.func.attr == "write_text")
        and not any(keyword.arg == "encoding" for keyword in call.keywords)
    ]
    assert found == []


def test_the_lowest_versions_that_are_tried_are_the_floors() -> None:
    """All but torch's, of which old versions are not on PyPI without CUDA."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tried = {one.name: one.specifier for one in map(Requirement, filter(lambda line: line[:1] not in "#", lines))}
    optional = [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    of_all = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert {one.name for one in of_all} - set(tried) == {"torch"}
    for one in (*of_all, *map(Requirement, optional)):
        floors = [part.version for part in one.specifier if part.operator == ">="]
        if one.name in tried and floors:
            (pin,) = tried[one.name]
            same = Version(pin.version).release[: len(Version(floors[0]).release)] == Version(floors[0]).release
            assert (pin.operator, same) == ("==", True), f"{pin} of {one.name} is not its floor, {floors[0]}"


def test_what_a_release_compares_is_there_to_compare() -> None:
    """The release workflow looks for these lines, with the version of the tag in each."""
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    version = PROJECT["project"]["version"]
    lines = {
        "pyproject.toml": f'version = "{version}"',
        "hf_msae/__init__.py": f'__version__ = "{version}"',
        "CITATION.cff": f"version: {version}",
    }
    for name, line in lines.items():
        assert line in (ROOT / name).read_text().splitlines(), name
        assert name in workflow
    assert re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
