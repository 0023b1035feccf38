"""What the Space opens and refuses, how it is published, and how it runs where a GPU is lent."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from msae_space import drawing
from msae_space.library import Library
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.settings import Settings, read_settings
from msae_space.zerogpu import on_gpu
from patience import HANG_SECONDS

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.errors import HfMsaeError
from hf_msae.hub.spaces import copy_package, space_folder
from hf_msae.research.meta import train_meta_sae
from hf_msae.steering import LatentEdit, SteeredPipeline, Steering

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


# Library and settings


def test_a_visitor_reads_no_folder_of_the_machine(library, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for source in (str(tmp_path), "../secret", "a b", "x" * 200):
        with pytest.raises(SpaceError, match="owner/name"):
            library.entries(source)


def test_a_repo_that_is_not_there_is_told(library, hub):
    with pytest.raises(ValueError, match="no folder and no Hub repo somebody/nothing"):
        library.entries("somebody/nothing")


def test_hub_saes_open_with_their_model_and_code_is_never_run(hub, library, lm, tokenizer, tmp_path):
    lm.push_to_hub("tester/lm")
    tokenizer.push_to_hub("tester/lm")
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4}
    lm.base_model.push_to_hub("tester/body")
    tokenizer.push_to_hub("tester/body")
    for name, base in (
        ("good", "tester/lm"),
        ("headless", "tester/body"),
        ("gone", "tester/none"),
        ("path", "../lm"),
        ("silent", None),
    ):
        MatryoshkaSAE(MatryoshkaSAEConfig(**shape, site="layers.0", base_model=base)).push_to_hub(f"tester/{name}")
    loaded = library.open(Key("tester/good"))
    assert str(loaded.site) == "model.layers.0:output"
    assert loaded.model.config.vocab_size == lm.config.vocab_size
    for name, words in (
        ("gone", "'tester/none'.*cannot be loaded"),
        ("headless", "saved without a head"),
        ("path", "'path/to/lm', which is not"),
        ("silent", "does not say"),
    ):
        with pytest.raises(SpaceError, match=words):
            library.open(Key(f"tester/{name}"))
    lm.save_pretrained(tmp_path / "secret")
    below = {"base_model_name_or_path": str(tmp_path / "secret"), "peft_type": "LORA"}
    hub.put("tester/adapter", {"adapter_config.json": json.dumps(below).encode()})
    adapted = MatryoshkaSAEConfig(**shape, site="layers.0", base_model="tester/lm", adapter="tester/adapter")
    MatryoshkaSAE(adapted).push_to_hub("tester/adapted")
    with pytest.raises(SpaceError, match=r"secret.* is a folder here"):
        library.open(Key("tester/adapted"))
    with pytest.raises(SpaceError, match="no SAE 'other'"):
        library.open(Key("tester/good", "other"))
    code = b'raise SystemExit("the code of a model ran")'
    config = b'{"model_type": "strange", "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}}'
    hub.put("tester/strange", {"config.json": config, "strange.py": code})
    strange = MatryoshkaSAEConfig(**shape, site="layers.0", base_model="tester/strange")
    MatryoshkaSAE(strange).push_to_hub("tester/coded")
    with pytest.raises(SpaceError, match="code of their own"):
        library.open(Key("tester/coded"))


def test_a_model_too_large_for_the_machine_is_refused_before_its_weights(hub, library, lm):
    config = {**lm.config.to_dict(), "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 200}
    hub.put("tester/huge", {"config.json": json.dumps(config).encode()})
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4}
    MatryoshkaSAE(MatryoshkaSAEConfig(**shape, site="layers.0", base_model="tester/huge")).push_to_hub("tester/toobig")
    with pytest.raises(SpaceError, match=r"billion parameters and needs about [\d,]+ GiB"):
        library.open(Key("tester/toobig"))


def test_nobody_waits_for_what_somebody_else_loads(story_sae, tmp_path):
    MatryoshkaSAE.from_pretrained(story_sae).save_pretrained(tmp_path / "other")
    here, slow = Key(str(story_sae)), Key(str(tmp_path / "other"))
    began, go_on = threading.Event(), threading.Event()

    class Slow(Library):
        def load(self, key: Key) -> LoadedSAE:
            if key == slow:
                began.set()
                assert go_on.wait(HANG_SECONDS)
            return super().load(key)

    library = Slow((here.source, slow.source))
    first = library.open(here)
    loading = [threading.Thread(target=library.open, args=(slow,)) for _ in range(2)]
    for thread in loading:
        thread.start()
    assert began.wait(HANG_SECONDS)
    assert library.open(here).sae is first.sae, "it was not had while another was loaded"
    go_on.set()
    for thread in loading:
        thread.join()
    assert library.open(slow).key == slow


def test_settings_are_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "space.json"
    monkeypatch.setenv("MSAE_SPACE", str(path))
    with pytest.raises(ValueError, match=r"There is no .*space\.json"):
        read_settings()
    path.write_text('{"saes": ["a/b"], "title": "T"}')
    assert read_settings() == Settings(("a/b",), None, "T")
    for text, words in (
        ("{", "cannot be read"),
        ('{"saes": []}', "at least one"),
        ('{"saes": ["a/b"], "sae": "a"}', "unknown key 'sae'"),
        ("[" * 100_000, "cannot be read"),
        ("3", "with a list of SAEs"),
        ("[1]", "with a list of SAEs"),
        ('{"saes": "a/b"}', "with a list of SAEs"),
        ('{"saes": [["a"]]}', "at least one"),
        ('{"saes": ["a/b"], "title": 3}', "a text"),
        ('{"saes": ["a/b"], "meta_sae": {}}', "a text"),
    ):
        path.write_text(text)
        with pytest.raises(HfMsaeError, match=words):
            read_settings()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HfMsaeError, match="cannot be read"):
        read_settings()


def test_zerogpu_lends_a_gpu_only_where_its_package_is(tmp_path, monkeypatch):
    def function() -> int:
        return 1

    assert on_gpu(function) is function
    (tmp_path / "empty" / "spaces").mkdir(parents=True)  # a folder of that name, as the repository has
    monkeypatch.syspath_prepend(tmp_path / "empty")
    assert on_gpu(function) is function
    monkeypatch.delitem(sys.modules, "spaces", raising=False)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "spaces.py").write_text("def GPU(function):\n    return lambda: function() + 41\n")
    monkeypatch.syspath_prepend(tmp_path / "real")
    assert on_gpu(function)() == 42
    sys.modules.pop("spaces")


# As ZeroGPU does it: each call in a forked process, its arguments and results pickled, the latter one by one.
ZEROGPU = """
import inspect, multiprocessing, pickle
from queue import Empty

context = multiprocessing.get_context("fork")
def _work(function, packed, results):
    args, kwargs = pickle.loads(packed)
    try:
        found = function(*args, **kwargs)
        for one in found if inspect.isgeneratorfunction(function) else [found]:
            results.put((True, pickle.dumps(one)))
    except Exception as error:
        results.put((True, pickle.dumps(error)))
    results.put((False, None))

def _lend(function, args, kwargs):
    packed, results = pickle.dumps((args, kwargs)), context.Queue()
    process = context.Process(target=_work, args=(function, packed, results), daemon=True)
    process.start()
    while (one := results.get())[0]:
        value = pickle.loads(one[1])
        if isinstance(value, Exception):
            raise value
        yield value
    process.join()

def GPU(function):
    if inspect.isgeneratorfunction(function):
        return lambda *args, **kwargs: _lend(function, args, kwargs)
    return lambda *args, **kwargs: next(_lend(function, args, kwargs))
"""
LENT = """
import json, sys
import hf_msae, hf_msae.modeling, hf_msae.worlds.stories as stories
from msae_space import trials
from msae_space.library import Library
from msae_space.links import View
from msae_space.latent_index import LatentIndex
from msae_space.reading import read, read_levels
from msae_space.settings import read_settings
from msae_space.strengths import Dial
from msae_space.tab_compare import draw_parts
from msae_space.tab_steer import RUNS, run
from msae_space.loaded_sae import Key
import spaces

# All is tried out here, and little of it.
trials.NUM_STORIES, trials.NUM_CANDIDATES, trials.NUM_TRIED, trials.NUM_NEW_TOKENS = 4, 8, 2, 4
settings = read_settings()
library = Library(settings.saes)
loaded = library.open(Key(settings.saes[0]))
view = View(loaded.key, prompt="One day", dials=(Dial(7, 1.5),), max_new_tokens=12)
drawn = list(run(loaded, view, "a"))
assert len(drawn) > 4 and "nats per token" in drawn[-1] and 'data-state="done"' in drawn[-1], drawn[-1]
halted = []
for one in run(loaded, View(loaded.key, prompt="One day", max_new_tokens=60), "b"):
    halted.append(one)
    if len(halted) == 3:
        RUNS.stop("b")
assert len(halted) < 20 and 'data-state="done"' in halted[-1]
index = LatentIndex(loaded)
index.wait()
assert index.progress == "" and loaded.mean_norm > 0
assert any("owl" in hit.why for hit in index.search("owl"))
assert "meta-latents" in draw_parts(loaded, index, settings.meta_sae, 5)
assert read(loaded, "A little owl.").active and len(read_levels(loaded, "A little owl.")[1]) == 3
modules = [hf_msae, hf_msae.modeling, stories]
print(json.dumps({"files": [one.__file__ for one in modules], "site": str(loaded.site), "drawn": drawn[-1]}))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, loaded, story_sae) -> dict[str, Any]:
    """What a Space says of itself that was published, and runs where ZeroGPU lends a GPU. As on the Hub, its folder is
    where Python looks first.
    """
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    root = tmp_path_factory.mktemp("pushed")
    train_meta_sae(loaded.sae, num_latents=64, k=3, max_steps=10, random_control=False).sae.save_pretrained(
        root / "meta"
    )
    shutil.copytree(space_folder(), root / "space")
    copy_package(root / "space" / "hf_msae")
    assert not (root / "space" / "hf_msae" / "space").exists()
    shown = {"saes": [str(story_sae)], "meta_sae": str(root / "meta")}
    (root / "space" / "space.json").write_text(json.dumps(shown))
    (root / "lent").mkdir()
    (root / "lent" / "spaces.py").write_text(ZEROGPU)
    environment = {**os.environ, "PYTHONPATH": str(root / "lent"), "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(root / "cache")  # nothing is known of the latents yet
    environment.pop("MSAE_SPACE", None)
    ran = subprocess.run(
        [sys.executable, "-c", LENT],
        cwd=root / "space",
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {**json.loads(ran.stdout.splitlines()[-1]), "package": root / "space" / "hf_msae"}


def test_everything_works_in_the_processes_that_zerogpu_forks(pushed, loaded):
    pipe = SteeredPipeline(loaded.model, loaded.tokenizer, loaded.sae, Steering([LatentEdit(7, 1.5)]))
    expected = pipe("One day", seed=0, temperature=0.7, max_new_tokens=12)[0]["generated_text"]
    assert drawing.text(expected.removeprefix("One day")) in pushed["drawn"]


def test_a_pushed_space_runs_the_package_that_it_carries(pushed):
    assert all(Path(file).is_relative_to(pushed["package"]) for file in pushed["files"]), pushed["files"]
    assert pushed["site"] == "model.layers.2:output"


# The commands


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_space_push_publishes_the_page_in_one_commit(hub, story_sae, capsys):
    MatryoshkaSAE.from_pretrained(story_sae).push_to_hub("tester/owls")
    assert run("space", "push", "tester/page", "tester/owls", "--title", "Owls") == 0
    assert "tester/page" in capsys.readouterr().out
    files = hub.files("tester/page", kind="space")
    here = {path.relative_to(space_folder()).as_posix() for path in space_folder().rglob("*") if path.is_file()}
    here = {path for path in here if "cache" not in path}
    assert {path for path in files if not path.startswith("hf_msae/")} - {".gitattributes"} == here | {"space.json"}
    assert yaml.safe_load(files["space.json"]) == {"saes": ["tester/owls"], "meta_sae": None, "title": "Owls"}
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["title"] == "Owls"
    assert front["sdk"] == "gradio"
    assert front["models"] == ["tester/owls"]
    commits = HfApi().list_repo_commits("tester/page", repo_type="space")
    assert len(commits) == 2  # the empty repo, and everything


def test_space_push_refuses_what_a_space_could_not_show(hub, story_sae, capsys, monkeypatch):
    for arguments, words in (
        (["push", "tester/page", str(story_sae)], "a Space cannot read"),
        (["push", "tester/owls"], "needs the Space's name and an SAE"),
        (["run"], "needs the SAE to show"),
        (["push", "tester/page", "tester/nothing"], "no Hub repo tester/nothing"),
        (["run", "tester/nothing"], "no Hub repo tester/nothing"),
    ):
        assert run("space", *arguments) == 2
        assert words in capsys.readouterr().err
    local = MatryoshkaSAE.from_pretrained(story_sae)
    local.push_to_hub("tester/owls")
    local.config.base_model = "/home/me/lm"
    local.push_to_hub("tester/private")
    assert run("space", "push", "tester/page", "tester/private") == 2
    assert "language model 'path/to/lm'" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert run("space", "push", "tester/page", "tester/owls") == 2
    assert "refused the Space" in capsys.readouterr().err
    assert ("space", "tester/page") not in hub.repos


def test_requirements_are_those_of_the_package_as_it_is_tested():
    lines = (space_folder() / "requirements.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    tested = dict(
        line.strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.match(r"\w.*==", line)
    )
    assert pinned == {name: tested[name] for name in pinned}
    assert {"torch", "transformers", "huggingface-hub"} <= set(pinned)
    # What the package needs and neither these nor Gradio bring.
    wanted = re.search(r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    brought = {"numpy", "pyyaml", "pyarrow", "psutil"}  # the last two by datasets and accelerate
    # And what makes its functions tools of agents.
    assert {re.split("[>=]", name)[0] for name in re.findall(r'"([^"]+)"', wanted)} - brought | {"mcp"} == {
        re.split("[>=]", line)[0] for line in lines
    }


def test_the_readme_names_the_gradio_that_is_tested():
    gradio = pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    front = yaml.safe_load((space_folder() / "README.md").read_text().split("---")[1])
    assert front["sdk_version"] == gradio.__version__
    assert front["app_file"] == "app.py"
    assert (space_folder() / "app.py").is_file()
    assert len(front["short_description"]) <= 60  # the Hub refuses more
    assert math.isclose(float(front["python_version"]), 3.11)
