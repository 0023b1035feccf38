"""Pushing from a run to a real Hub on this machine: what arrives, and that nothing that fails there harms the run."""

import json
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from patience import until
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import load_documents
from hf_msae.hub.publishing import prepare_repo, push_folder
from hf_msae.hub.retrying import PublishError
from hf_msae.training import SAETrainer, SAETrainingArguments

pytestmark = pytest.mark.slow

REPO = "tester/owls"


def make_sae(k: int = 4) -> MatryoshkaSAE:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 24, 64], "k": k, "site": "layers.0"}
    return MatryoshkaSAE(MatryoshkaSAEConfig(**shape))


@pytest.fixture
def train(tmp_path, lm, tokenizer, texts):
    def run(sae=None, name="run", **changes):
        settings = {"max_steps": 8, "per_device_train_batch_size": 64, "block_tokens": 300, "context_length": 32}
        settings |= {
            "eval_tokens": 400,
            "calibration_tokens": 200,
            "ce_tokens": 0,
            "save_steps": 2,
            "logging_steps": 2,
        }
        settings |= {"use_cpu": True, "disable_tqdm": True, "push_to_hub": True, "hub_model_id": REPO}
        args = SAETrainingArguments(output_dir=str(tmp_path / name), **(settings | changes))
        return SAETrainer(lm, sae or make_sae(), args, texts, processing_class=tokenizer).train()

    return run


def commits(hub) -> list[str]:
    return [commit.title for commit in hub.repo(REPO).commits.values()]


def test_the_result_is_pushed_at_the_end(hub, train, tmp_path):
    train()
    assert sorted(commits(hub)) == ["End of training", "initial commit"]
    pushed = MatryoshkaSAE.from_pretrained(REPO)
    local = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(pushed.W_dec, local["W_dec"])
    assert "metrics.json" in hub.files(REPO)
    assert not hub.repo(REPO).private


@pytest.mark.parametrize("relative", [False, True])
def test_no_place_on_this_machine_is_published(hub, tmp_path, lm, tokenizer, texts, monkeypatch, relative):
    """Neither in what is pushed at the end, nor with every save, nor by hand, nor in what trackers are told."""
    secret = tmp_path / "private-place"
    lm.save_pretrained(secret / "lm")
    (secret / "texts.txt").write_text("\n\n".join(texts))
    first = make_sae()
    first.config.site = "model.layers.0:output"
    first.save_pretrained(secret / "first")
    monkeypatch.chdir(secret)
    root = "." if relative else str(secret)
    model = type(lm).from_pretrained(f"{root}/lm").eval()
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**make_sae().config.to_diff_dict() | {"site": "layers.0"}))
    settings = {"max_steps": 4, "per_device_train_batch_size": 64, "block_tokens": 300, "context_length": 32}
    settings |= {"eval_tokens": 400, "calibration_tokens": 200, "ce_tokens": 0, "save_steps": 2, "use_cpu": True}
    args = SAETrainingArguments(
        output_dir=f"{root}/run", init_from="first" if relative else f"{root}/first", push_to_hub=True,
        hub_model_id=REPO, hub_strategy="every_save", report_to=["tensorboard"], disable_tqdm=True, **settings,
    )  # fmt: skip
    documents = load_documents("texts.txt" if relative else f"{root}/texts.txt")
    SAETrainer(model, sae, args, documents, processing_class=tokenizer).train()
    monkeypatch.chdir(tmp_path)  # where nothing tells a relative path from a repo's name
    sae.push_to_hub("tester/by-hand")
    push_folder(secret / "run", "tester/folder")
    for repo in (REPO, "tester/by-hand", "tester/folder"):
        folder = Path(snapshot_download(repo))
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert b"private-place" not in path.read_bytes(), path
        arguments = folder / "training_arguments.json"
        if arguments.is_file():
            assert json.loads(arguments.read_text())["init_from"] == "path/to/first"
        assert json.loads((folder / "config.json").read_text())["base_model"] == "path/to/lm"
    events = b"".join(path.read_bytes() for path in (secret / "run" / "trackers").rglob("*") if path.is_file())
    assert events
    assert b"private-place" not in events
    assert json.loads((secret / "run" / "config.json").read_text())["base_model"] == str(secret / "lm")


def test_every_save_is_pushed_too_and_state_stays_at_home(hub, train, tmp_path):
    train([make_sae(), make_sae(2)], hub_strategy="every_save", hub_private_repo=True, hub_model_id="owls")
    titles = commits(hub)  # the repo of a bare name is the user's own
    assert "End of training" in titles
    assert "Step 2" in titles
    assert hub.repo(REPO).private
    sent = {request.path for request in hub.asked("^(PUT|POST)")}
    assert not any("learner" in path or "trainer_state" in path for path in (*sent, *hub.files(REPO)))
    assert {path.split("/")[0] for path in hub.files(REPO) if path.endswith("model.safetensors")} == {
        "layers.0-64-k4",
        "layers.0-64-k2",
    }
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    "fault",
    [
        {"pattern": "POST .*/commit/", "status": 403, "times": 99},
        {"pattern": "POST .*/commit/", "drop_after": 10, "times": 3},
        {"pattern": "POST .*/preupload/", "status": 503, "times": 2},
    ],
    ids=["refused", "dropped connections", "503"],
)
def test_whatever_the_hub_does_the_result_is_the_same(hub, train, tmp_path, fault, caplog):
    train(name="alone", push_to_hub=False, hub_model_id=None)
    hub.fail(**fault)
    train(hub_strategy="every_save")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if fault.get("status") == 403:
        assert commits(hub) == ["initial commit"]
        assert f"The result did not reach {REPO}" in caplog.text
        assert f"hf-msae push {tmp_path / 'run'} {REPO}" in caplog.text
    else:
        assert "End of training" in commits(hub)  # tried again


def test_a_slow_push_is_not_waited_for_and_others_are_left_out(hub, train, tmp_path):
    """The first push hangs until the run has written its result; then it comes before that, as it began before."""
    ended = threading.Event()
    hub.fail("POST .*/commit/", until=ended)

    def wait_for_result() -> None:
        until((tmp_path / "run" / "metrics.json").exists)
        ended.set()

    watch = threading.Thread(target=wait_for_result)
    watch.start()
    train(hub_strategy="every_save")
    watch.join()
    assert commits(hub) == ["initial commit", "Step 2", "End of training"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_token": "hf_read"}, "The token may not write to tester/owls"),
        ({"hub_token": "hf_stranger"}, "The token may not write to tester/owls"),
        ({"hub_model_id": "a/b/c"}, "is not the id of a Hub repo"),
        ({"hub_private_repo": True}, "exists and is public, but private was asked for"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(hub, train, tmp_path, changes, message):
    hub.put(REPO, {"notes.txt": b"there already"})
    with pytest.raises(PublishError, match=message):
        train(**changes)
    assert not (tmp_path / "run").exists()


def test_the_token_is_written_nowhere(hub, train, tmp_path):
    train(hub_token=hub.token)
    holding = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()
    ]
    assert holding == []
    args = SAETrainingArguments(push_to_hub=True, hub_token=hub.token)
    assert hub.token not in repr(args)
    assert "hub_token" not in args.to_dict()
    with pytest.raises(ValueError, match="hub_model_id='a/b' is of use only with push_to_hub"):
        SAETrainingArguments(hub_model_id="a/b")


def test_prepare_repo_makes_it_once_and_names_its_owner(hub):
    assert prepare_repo("owls", private=True) == REPO
    assert prepare_repo(REPO) == REPO
    assert hub.repo(REPO).private
    assert hub.files(REPO).keys() == {".gitattributes"}
