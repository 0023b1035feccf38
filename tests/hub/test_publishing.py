"""Pushing to the Hub on this machine, and getting back what was pushed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from patience import HANG_SECONDS

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub.index import NoSAEError, list_saes
from hf_msae.hub.publishing import push, push_folder
from hf_msae.hub.retrying import PublishError

pytestmark = pytest.mark.slow

REPO = "tester/owls"
CODE = {
    "configuration_matryoshka_sae.py",
    "dense_ops.py",
    "modeling_matryoshka_sae.py",
    "objective.py",
    "prefix_loading.py",
    "sharing.py",
    "sparse_encoder.py",
    "sparse_ops.py",
}


def make_sae(seed: int = 0, **changes: Any) -> MatryoshkaSAE:
    """An SAE that was never trained, with thresholds and statistics as a run leaves them."""
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 64], "k": 4}
    torch.manual_seed(seed)
    origin = {"site": "model.layers.1:output", "base_model": "owner/lm"}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | origin | changes))).eval()
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn_like(sae.W_enc)
        sae.b_dec.copy_(torch.randn(sae.config.hidden_size))
    sae.calibrate_threshold([torch.randn(500, sae.config.hidden_size)])
    return sae


def write_run(folder: Path, sae: MatryoshkaSAE, fve: tuple[float, ...] = (0.5, 0.875)) -> Path:
    """What a training run leaves behind, unfinished business included."""
    levels = [
        {"prefix": size, "l0": 2.0 + index, "fve": value, "dead": 0.25, "ce_recovered": 0.75}
        for index, (size, value) in enumerate(zip(sae.config.prefix_sizes, fve, strict=True))
    ]
    sae.config.measured = {"tokens": 1000, "l0": [level["l0"] for level in levels], "fve": list(fve)}
    sae.save_pretrained(folder)
    run = {
        "dataset": "owner/texts train",
        "training_tokens": 2000,
        "steps": 2,
        "learning_rate": 0.01,
        "tokens_per_second": 10.0,
    }
    numbers = {"tokens": 1000, "ce_tokens": 500, "ce_clean": 1.0, "ce_zero": 5.0, "ce_mean": 4.0}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    metrics = {"levels": levels, **numbers, **run, "versions": versions}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    arguments = {"output_dir": str(folder), "max_steps": 2, "run_name": "mine"}
    (folder / "training_arguments.json").write_text(json.dumps(arguments))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in make_log(levels)))
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "learner.pt").write_bytes(b"state")
    sae.save_pretrained(folder / "checkpoint-2")
    (folder / "trackers").mkdir()
    (folder / "trackers" / "events").write_bytes(b"events")
    return folder


def make_log(levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    errors = [1 - level["fve"] for level in levels]
    values = {"aux_loss": 0.0, "l0": 4.0, "dead": 0.0, "level_losses": errors}
    return [{"step": step, "tokens": 1000 * step, "loss": 1 / step, **values} for step in (1, 2)]


def card(hub, path: str = "README.md", repo: str = REPO) -> str:
    return hub.files(repo)[path].decode()


def tensors(sae: MatryoshkaSAE) -> dict[str, torch.Tensor]:
    return dict(sae.state_dict())


def assert_same(one: MatryoshkaSAE, other: MatryoshkaSAE) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())
    unsaved = {"transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"}
    mine, theirs = one.config.to_dict(), other.config.to_dict()
    assert {k: v for k, v in mine.items() if k not in unsaved} == {k: v for k, v in theirs.items() if k not in unsaved}
    x = torch.randn(3, 5, one.config.hidden_size)
    assert torch.equal(one.encode(x), other.encode(x))
    assert int((one.encode(x) > 0).sum()) > 0


# There and back


@pytest.mark.parametrize("subfolder", [None, "layers.1/64"])
def test_what_is_pushed_comes_back(hub, subfolder):
    sae = make_sae()
    url = sae.push_to_hub(REPO, subfolder=subfolder)
    assert url == f"{hub.endpoint}/{REPO}/commit/{HfApi().model_info(REPO).sha}"
    back = MatryoshkaSAE.from_pretrained(REPO, subfolder=subfolder or "")
    assert_same(sae, back)
    assert back.config.prefix_sizes == [8, 64]
    assert float(back.threshold.max()) > 0


def test_everything_is_one_commit(hub):
    push(make_sae(), REPO, subfolder="a", commit_message="Owls")
    assert [commit.title for commit in HfApi().list_repo_commits(REPO)] == ["Owls", "initial commit"]
    in_folder = {"a/README.md", "a/config.json", "a/model.safetensors", *(f"a/{name}" for name in CODE)}
    assert set(hub.files(REPO)) >= {".gitattributes", "README.md", "sae_index.json", *CODE, *in_folder}
    assert {path for path in hub.files(REPO) if not path.endswith(".py")} == {
        ".gitattributes", "README.md", "sae_index.json", "a/README.md", "a/config.json", "a/model.safetensors",
    }  # fmt: skip


# Repo and subfolder in turn, after the files with the input and for the outputs.
TRIAL = """
import sys
sys.modules["hf_msae"] = None
import torch
from transformers import AutoModel
x, outputs = torch.load(sys.argv[1]), []
for repo, subfolder in zip(sys.argv[3::2], sys.argv[4::2]):
    sae = AutoModel.from_pretrained(repo, subfolder=subfolder, trust_remote_code=True)
    outputs.append(sae.encode(x).detach())
torch.save(outputs, sys.argv[2])
"""


def test_a_machine_without_hf_msae_loads_both_kinds_of_place(hub, tmp_path):
    sae, x = make_sae(), torch.randn(4, 16)
    push(sae, "tester/one")
    push(sae, "tester/many", subfolder="a/b")
    torch.save(x, tmp_path / "x.pt")
    places = ["tester/one", "", "tester/many", "a/b"]
    trial = [sys.executable, "-c", TRIAL, str(tmp_path / "x.pt"), str(tmp_path / "out.pt"), *places]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(trial, capture_output=True, text=True, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = torch.load(tmp_path / "out.pt")
    assert len(outputs) == 2
    assert all(torch.equal(output, sae.encode(x)) for output in outputs)


# A run's folder


def test_a_runs_folder_leaves_its_unfinished_business_at_home(hub, tmp_path):
    push_folder(write_run(tmp_path / "run", make_sae()), REPO)
    files = hub.files(REPO)
    assert {path for path in files if not path.endswith(".py")} - {"curves.png"} == {
        ".gitattributes", "README.md", "config.json", "metrics.json", "model.safetensors", "training_arguments.json",
        "training_log.jsonl",
    }  # fmt: skip
    assert json.loads(files["training_arguments.json"]) == {"max_steps": 2}
    assert str(tmp_path) not in card(hub)
    assert "| 64 | 3.00 | 0.875 | 0.750 | 25.0 |" in card(hub)
    assert f'MatryoshkaSAE.from_pretrained("{REPO}")' in card(hub)
    data = ModelCard(card(hub)).data
    assert data.datasets == ["owner/texts"]
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {
        ("fve", 0.875), ("l0", 3.0), ("ce_recovered", 0.75),
    }  # fmt: skip


def test_an_sae_loaded_from_a_run_is_pushed_with_the_runs_numbers(hub, tmp_path):
    folder = write_run(tmp_path / "run", make_sae())
    MatryoshkaSAE.from_pretrained(folder).push_to_hub(REPO)
    assert "| 64 | 3.00 | 0.875 | 0.750 | 25.0 |" in card(hub)
    assert "2,000 in 2 steps" in card(hub)


def test_a_prefix_of_a_run_keeps_only_its_own_levels(hub, tmp_path):
    folder = write_run(tmp_path / "run", make_sae())
    MatryoshkaSAE.from_pretrained(folder, prefix=8).push_to_hub(REPO)
    assert "| 8 | 2.00 | 0.500 | 0.750 | 25.0 |" in card(hub)
    assert "0.875" not in card(hub)
    assert [level["prefix"] for level in json.loads(hub.files(REPO)["metrics.json"])["levels"]] == [8]


def test_numbers_of_another_sae_are_not_taken(hub, tmp_path):
    folder = write_run(tmp_path / "run", make_sae())
    sae = make_sae(1)
    sae.config.name_or_path = str(folder)
    sae.push_to_hub(REPO)
    assert "No measurement came with this SAE" in card(hub)
    assert "metrics.json" not in hub.files(REPO)
    assert ModelCard(card(hub)).data.eval_results is None


def test_the_numbers_that_the_sae_carries_are_enough_for_a_table(hub):
    sae = make_sae()
    sae.config.measured = {"tokens": 1000, "l0": [2.0, 3.0], "fve": [0.5, 0.875]}
    with torch.no_grad():
        sae.firing_rate[:48] = 0.01
        sae.max_activation[:48] = torch.arange(48.0)
    sae.push_to_hub(REPO)
    assert "| 8 | 2.00 | 0.500 | – | 0.0 |" in card(hub)
    assert "| 64 | 3.00 | 0.875 | – | 25.0 |" in card(hub)
    assert "latent = 47\n" in card(hub)


def test_a_grid_becomes_a_repo_of_several(hub, tmp_path):
    log = ""
    for layer in (2, 10):
        sae = make_sae(layer, site=f"model.layers.{layer}:output")
        folder = write_run(tmp_path / "grid" / f"l{layer}", sae, (0.5, layer / 16))
        lines = (folder / "training_log.jsonl").read_text().splitlines()
        log += "".join(json.dumps({"sae": f"l{layer}", **json.loads(line)}) + "\n" for line in lines)
        (folder / "training_log.jsonl").unlink()
    (tmp_path / "grid" / "training_log.jsonl").write_text(log)
    (tmp_path / "grid" / "metrics.json").write_text("{}")
    push_folder(tmp_path / "grid", REPO)
    assert [(entry.subfolder, entry.fve) for entry in list_saes(REPO)] == [("l2", 0.125), ("l10", 0.625)]
    files = hub.files(REPO)
    assert {"metrics.json", "l2/metrics.json", "l10/training_log.jsonl"} <= files.keys()
    assert [json.loads(line)["tokens"] for line in files["l10/training_log.jsonl"].splitlines()] == [1000, 2000]
    assert not any("checkpoint" in path or "trackers" in path for path in files)
    assert len(HfApi().list_repo_commits(REPO)) == 2


def test_what_an_older_run_left_does_not_stay_beside_a_new_sae(hub, tmp_path):
    push_folder(write_run(tmp_path / "run", make_sae()), REPO)
    push(make_sae(1), REPO)
    assert not {"metrics.json", "training_log.jsonl", "curves.png"} & hub.files(REPO).keys()


# Branches, pull requests, privacy


def test_a_new_branch_is_made(hub):
    push(make_sae(), REPO)
    push(make_sae(1), REPO, revision="wide/64")
    assert_same(make_sae(1), MatryoshkaSAE.from_pretrained(REPO, revision="wide/64"))
    assert_same(make_sae(0), MatryoshkaSAE.from_pretrained(REPO))


def test_a_pull_request_leaves_main_as_it_was(hub):
    push(make_sae(), REPO)
    before = hub.files(REPO)
    url = push(make_sae(1), REPO, create_pr=True)
    assert url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO) == before
    assert_same(make_sae(1), MatryoshkaSAE.from_pretrained(REPO, revision="refs/pr/1"))


def test_somebody_else_may_open_a_pull_request_only(hub):
    push(make_sae(), REPO)
    with pytest.raises(PublishError, match="may not write to tester/owls"):
        push(make_sae(1), REPO, token=hub.stranger_token)
    assert "discussions/1" in push(make_sae(1), REPO, token=hub.stranger_token, create_pr=True)


def test_private_is_private_or_refused(hub):
    push(make_sae(), REPO, private=True)
    assert HfApi().model_info(REPO).private is True
    push(make_sae(), "tester/public")
    with pytest.raises(PublishError, match="exists and is public, but private was asked for"):
        push(make_sae(1), "tester/public", private=True)
    assert_same(make_sae(0), MatryoshkaSAE.from_pretrained("tester/public"))


# Refusals


def test_without_a_token_nothing_is_tried(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="needs a token that may write: run `hf auth login`"):
        push(make_sae(), REPO)
    assert hub.requests == []


def test_a_token_that_only_reads_is_named(hub):
    with pytest.raises(PublishError, match="The token may not write to tester/owls"):
        push(make_sae(), REPO, token=hub.read_token)
    assert not HfApi().repo_exists(REPO)


def test_a_token_that_nobody_knows_is_named(hub):
    with pytest.raises(PublishError, match="does not take this token"):
        push(make_sae(), REPO, token="hf_unknown")


@pytest.mark.parametrize("repo", ["tester/a/b", "tester/a b", "datasets/tester/a", "https://huggingface.co/tester/a"])
def test_a_bad_id_is_refused(hub, repo):
    with pytest.raises(PublishError, match="owner/name"):
        push(make_sae(), repo)


def test_another_model_is_not_overwritten(hub):
    HfApi().create_repo(REPO)
    hub.put(REPO, {"config.json": b'{"model_type": "llama"}', "README.md": b"# My llama"})
    before = hub.files(REPO)
    with pytest.raises(PublishError, match=r"config\.json in tester/owls is that of another model .*'llama'"):
        push(make_sae(), REPO)
    assert hub.files(REPO) == before
    push(make_sae(), REPO, subfolder="saes/a")
    assert card(hub) == "# My llama"
    assert [entry.subfolder for entry in list_saes(REPO)] == ["saes/a"]


def test_the_root_of_a_collection_stays_one(hub):
    push(make_sae(), REPO, subfolder="a")
    with pytest.raises(PublishError, match=r"holds SAEs in folders \(a\); give a subfolder"):
        push(make_sae(), REPO)


def test_a_subfolder_stays_inside_the_repo(hub):
    with pytest.raises(PublishError, match="must be a path below"):
        push(make_sae(), REPO, subfolder="../a")


def test_a_folder_without_an_sae_says_what_it_holds(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(NoSAEError, match=r"holds no Matryoshka SAE. It holds notes\.txt"):
        push_folder(tmp_path, REPO)
    with pytest.raises(PublishError, match="There is no folder"):
        push_folder(tmp_path / "absent", REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "not a complete safetensors file"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "not a complete safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda folder: make_sae(num_latents=32, prefix_sizes=[32]).config.save_pretrained(folder), "belong together"),
        (lambda folder: [path.unlink() for path in folder.glob("*.py")], "lacks the code"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "no JSON that can be read"),
    ],
)
def test_a_spoilt_folder_is_refused_before_anything_is_sent(hub, tmp_path, spoil, said):
    folder = write_run(tmp_path / "run", make_sae())
    spoil(folder)
    with pytest.raises(NoSAEError, match=said):
        push_folder(folder, REPO)
    assert hub.requests == []


# Faults on the way


@pytest.mark.parametrize("fault", ["POST /api/models/tester/owls/commit", "PUT /large", "POST /api/repos/create"])
@pytest.mark.parametrize("how", [{"status": 503}, {"drop_after": 100}])
def test_a_fault_that_passes_is_overcome(hub, fault, how):
    hub.fail(fault, **how)
    sae = make_sae()
    push(sae, REPO)
    assert_same(sae, MatryoshkaSAE.from_pretrained(REPO))
    assert len(HfApi().list_repo_commits(REPO)) == 2


def test_a_push_that_fails_leaves_the_repo_as_it_was(hub, monkeypatch):
    monkeypatch.setattr("hf_msae.hub.retrying.ATTEMPTS", 2)
    push(make_sae(), REPO)
    before = hub.files(REPO)
    hub.fail("POST /api/models/tester/owls/commit", status=503, times=20)
    with pytest.raises(PublishError, match=r"did not get through .* in 2 attempts.*whole or absent"):
        push(make_sae(1), REPO)
    assert hub.files(REPO) == before
    hub.faults.clear()
    uploads = len(hub.asked("PUT /large"))
    push(make_sae(1), REPO)
    assert len(hub.asked("PUT /large")) == uploads  # the weights were there already


def test_a_hub_out_of_reach_is_named(hub, monkeypatch):
    monkeypatch.setattr("hf_msae.hub.retrying.ATTEMPTS", 1)
    hub.stop()
    with pytest.raises(PublishError, match=f"did not get through to {hub.endpoint}"):
        push(make_sae(), REPO)


def test_pushers_at_the_same_time_all_get_into_the_index(hub):
    """All begin at once; whoever finds the index changed under it has to read it again."""
    push(make_sae(), REPO, subfolder="first")
    names, barrier, problems = ["a", "b", "c"], Barrier(3), []

    def publish(name: str) -> None:
        try:
            barrier.wait()
            push(make_sae(), REPO, subfolder=name)
        except Exception as error:  # a thread's failure would be lost
            problems.append(error)

    threads = [Thread(target=publish, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert [entry.subfolder for entry in list_saes(REPO)] == ["a", "b", "c", "first"]
    assert all(f"| [{name}](" in card(hub) for name in [*names, "first"])


def test_an_outdated_index_is_read_again(hub):
    """As where somebody else's commit came between reading and committing."""
    push(make_sae(), REPO, subfolder="first")
    hub.fail("POST /api/models/tester/owls/commit", status=412)
    push(make_sae(1), REPO, subfolder="second")
    assert [entry.subfolder for entry in list_saes(REPO)] == ["first", "second"]
    assert len(hub.asked("POST /api/models/tester/owls/commit")) == 3
