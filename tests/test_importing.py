"""`import hf_msae` imports nothing that takes time, and still registers the model with transformers."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG_SECONDS

import hf_msae
from hf_msae.cli.main import COMMANDS
from hf_msae.importing import Finder, lazy_names

ROOT = Path(__file__).resolve().parents[1]
# Each takes a good part of a second, or several.
HEAVY = (
    "torch",
    "transformers",
    "huggingface_hub",
    "datasets",
    "accelerate",
    "numpy",
    "matplotlib",
    "hf_msae.modeling",
)


def python(code: str, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == status, done.stderr
    return done.stdout.strip()


def heavy_after(code: str, status: int = 0) -> set[str]:
    """Which of the heavy packages are imported when the code has ended with this status."""
    shown = f"import sys, atexit; atexit.register(lambda: print('heavy:', *(set(sys.modules) & set({HEAVY!r}))))"
    return set(python(f"{shown}\n{code}", status=status).rpartition("heavy:")[2].split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import hf_msae", 0),
        ("import hf_msae; dir(hf_msae); hf_msae.HfMsaeError", 0),
        ("from hf_msae.cli.main import main; main(['--help'])", 0),
        ("from hf_msae.cli.main import main; main(['--version'])", 0),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code, status):
    assert heavy_after(code, status) == set()


@pytest.fixture(scope="module")
def heavy_of_commands() -> dict[str, list[list[str]]]:
    """Of every command, how it ends and what is imported after `--help` and after a mistyped flag, in one process."""
    code = f"""
import contextlib, io, json, sys
from hf_msae.cli.main import COMMANDS, main
found = {{}}
for command in COMMANDS:
    for flag in ("--help", "--no-such-flag"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main([command, flag])
            except SystemExit as end:
                found.setdefault(command, []).append([end.code, *sorted(set(sys.modules) & set({HEAVY!r}))])
print(json.dumps(found))
"""
    return json.loads(python(code))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_read_before_anything_heavy_is_imported(heavy_of_commands, command):
    assert heavy_of_commands[command] == [[0], [2]]


CONFIG = "hidden_size=8, num_latents=64"


ORDERS = (
    "import hf_msae; from transformers import AutoConfig, AutoModel",
    "from transformers import AutoConfig, AutoModel; import hf_msae",
    "import transformers; import hf_msae; from transformers import AutoConfig, AutoModel",
    "import hf_msae; import transformers.models.auto as a; AutoConfig, AutoModel = a.AutoConfig, a.AutoModel",
    "import hf_msae.modeling; from transformers import AutoConfig, AutoModel",
    "from hf_msae.sites import Site; from transformers import AutoConfig, AutoModel",
    "import importlib.util as u; import hf_msae; u.find_spec('transformers'); "
    "from transformers import AutoConfig, AutoModel",
    "import hf_msae, importlib; AutoModel = importlib.import_module('transformers').AutoModel; "
    "from transformers import AutoConfig",
)
REGISTERED = f"""
model = AutoModel.from_config(AutoConfig.for_model('matryoshka_sae', {CONFIG}))
print(type(model).__module__, model.publishing_module)
"""
LOADERS = "t = transformers; print(*(type(one).__name__ for one in (t, t.__spec__.loader, t.__loader__)))"
# Executes each code that it is given in a process of its own, forked when hf_msae and transformers are not there, and
# much of what they import is: it takes seconds, and what the order of imports changes is between the two.
EACH_APART = """
import gc, json, os, sys, tempfile
import scipy.optimize, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
gc.freeze()
assert not {"hf_msae", "transformers"} & set(sys.modules)
printed = []
for code in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        printed.append([status, file.read().strip()])
        if status:
            break
print(json.dumps(printed))
"""


THREADS = """
import hf_msae, threading
found, names = [], ["MatryoshkaSAE", "Site", "load_documents", "MatryoshkaSAE"]
threads = [threading.Thread(target=lambda name=name: found.append(getattr(hf_msae, name))) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found))
"""
OURS, THEIRS = f"import hf_msae, transformers; {LOADERS}", f"import transformers; {LOADERS}"


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each code prints in a process that has imported neither hf_msae nor transformers before it."""
    codes = {order: order + REGISTERED for order in ORDERS} | {code: code for code in (THREADS, OURS, THEIRS)}
    ended = json.loads(python(EACH_APART, json.dumps([*codes.values()])).splitlines()[-1])
    assert all(status == 0 for status, _ in ended), ended[-1]
    return dict(zip(codes, (text for _, text in ended), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_the_model_is_registered_in_whatever_order_things_are_imported(printed, imports):
    assert printed[imports] == "hf_msae.modeling.modeling_matryoshka_sae hf_msae.hub.publishing"


@pytest.mark.slow
def test_transformers_is_left_as_its_own_loader_makes_it(printed):
    assert printed[OURS] == printed[THEIRS] != ""


@pytest.mark.slow
def test_threads_may_use_names_at_once(printed):
    assert printed[THREADS] == "4"


@pytest.mark.parametrize("name", hf_msae.__all__)
def test_every_name_of_the_front_door_is_there(name):
    assert name in dir(hf_msae)
    found = getattr(hf_msae, name)
    if name not in ("__version__", "interpret"):
        assert found is getattr(importlib.import_module(found.__module__), name)


def test_what_types_are_checked_against_is_what_is_imported():
    tree = ast.parse(Path(hf_msae.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    types = {alias.name: node.module for node in checked.body for alias in node.names}
    homes = checked.orelse[0]
    lazy = {name: home for home, names in ast.literal_eval(homes.value).items() for name in names}
    assert types == lazy
    assert {*types, "__version__"} == set(hf_msae.__all__)


def test_interpret_is_a_room_and_is_called():
    from hf_msae import interpret
    from hf_msae.errors import InputError

    assert interpret is hf_msae.interpret is sys.modules["hf_msae.interpret"]
    with pytest.raises(InputError, match="max_tokens must be at least 1"):
        interpret(None, None, None, [], "nowhere", max_tokens=0)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_msae' has no attribute 'nothing'"):
        hf_msae.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from hf_msae import nothing")
    look_up, names = lazy_names("hf_msae", {"Site": "hf_msae.sites"})
    assert look_up("Site") is hf_msae.Site
    assert "Site" in names()


def test_one_finder_is_enough():
    importlib.reload(hf_msae)
    assert sum(isinstance(finder, Finder) for finder in sys.meta_path) == 1


def test_the_finder_of_a_checkout_finds_its_own_model():
    assert Path(hf_msae.modeling.__file__) == ROOT / "modeling" / "__init__.py"
    assert Finder().find_spec("hf_msae.training", None) is None
