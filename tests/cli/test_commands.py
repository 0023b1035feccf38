"""The commands as a user types them, in processes of their own where that matters."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import HANG_SECONDS, until
from safetensors.torch import load_file
from warm_processes import run_command, start_command

from hf_msae import MatryoshkaSAE
from hf_msae.cli import quickstart
from hf_msae.cli.main import main
from hf_msae.cli.quickstart import next_steps, telling_root
from hf_msae.interpret import Edge, Hierarchy
from hf_msae.training.grid import parse_prefix_sizes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer, texts) -> Path:
    """A model and a text file on disk."""
    folder = tmp_path_factory.mktemp("cli")
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--site", "layers.0",
        "--num-latents", "64", "--prefix-sizes", "8", "1/2", "1", "--k", "4", "--batch-size", "64",
        "--max-tokens", "1_280", "--block-tokens", "300", "--eval-tokens", "400", "--calibration-tokens", "200",
        "--ce-tokens", "200", "--context-length", "32", "--logging-steps", "5", "--use-cpu", "--disable-tqdm",
        "--output-dir", str(output), *more,
    ]  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_train_prints_a_table_and_what_to_do_next(folder, tmp_path, capsys):
    assert run(*command(folder, tmp_path / "out")) == 0
    text = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 20
    for level in metrics["levels"]:
        assert f"{level['fve']:.3f}" in text
    assert f"Saved to {tmp_path / 'out'}" in text
    assert text.split("Next:")[1].strip().count("\n") == 2
    assert MatryoshkaSAE.from_pretrained(tmp_path / "out").config.prefix_sizes == [8, 32, 64]


def test_the_quickstart_trains_prints_the_tree_and_steers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ("--eval-tokens", "10k", "--calibration-tokens", "10k", "--block-tokens", "60k")
    monkeypatch.setattr(quickstart, "HELD_OUT", smaller)
    assert run("quickstart", "--max-tokens", "120k", "--interpret-tokens", "30k") == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "Loading weights" not in captured.err  # all lies on this disk
    lines = printed.splitlines()
    shown = [line for line in lines if line.startswith("$ hf-msae")]
    assert [line.split()[2] for line in shown][:3] == ["train", "interpret", "tree"]
    # Each command is announced; there is one table of levels, one tree, and one list of what to do next.
    assert [lines[lines.index(line) - 1][:7] for line in shown] == ["1 of 4:", "2 of 4:", "3 of 4:", "4 of 4:"]
    assert printed.count("CE recovered") == printed.count("  fires on ") == 1
    assert [line.split()[1] for line in printed.split("Next:")[1].strip().splitlines()][1:] == ["eval", "train"]
    assert printed.count("Next:") == 1
    assert "..." not in printed.split("Next:")[1]
    assert "CE recovered" in printed
    assert "├── " in printed
    assert MatryoshkaSAE.from_pretrained(tmp_path / "runs" / "quickstart").config.prefix_sizes == [32, 128, 1024]


def test_the_quickstart_tells_how_the_shell_finds_the_program_where_it_does_not(tmp_path, monkeypatch):
    activate = tmp_path / "my env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "my env"))
    monkeypatch.setenv("PATH", "")
    first, rest = next_steps("runs/x").strip().split("\n", 1)
    assert first == "So that this shell finds hf-msae: source 'my env/bin/activate'"
    assert rest.startswith("Next:\n  hf-msae ")
    program = activate.parent / "hf-msae"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(activate.parent))
    assert next_steps("runs/x").strip() == rest


def test_the_quickstart_shows_the_root_with_most_below_it_that_is_a_concept():
    children = {0: [3, 4, 5], 1: [6, 7], 2: [8, 9, 10]}
    edges = [Edge(parent, child, 90, *[0.9] * 10) for parent, below in children.items() for child in below]
    hierarchy = Hierarchy(edges, [3, 12], [500] * 3 + [100] * 9, 1_000, {}, 0.0, [])
    names = ["the, a", "owl, fox", "red", "x", "y", "z", "fox", "dog", "of", "to", "sun", "w"]
    assert telling_root(hierarchy, names) == 1  # 0 is a function word, and of 2 only one child is none
    assert telling_root(hierarchy, ["the"] * 12) is None
    # One on 2% of tokens goes before one that has more below it and fires on half of them.
    rarely = Hierarchy(edges, [3, 12], [500, 500, 20] + [10] * 9, 1_000, {}, 0.0, [])
    assert telling_root(rarely, names) == 2


def test_repeated_flags_train_a_grid(folder, tmp_path):
    arguments = command(folder, tmp_path / "grid", "--site", "layers.1", "--k", "2", "--save-steps", "0")
    assert run(*arguments) == 0
    names = {path.parent.name for path in (tmp_path / "grid").glob("*/model.safetensors")}
    assert len(names) == 4
    assert {name.split("-")[-1] for name in names} == {"k2", "k4"}


def test_a_tokenized_sae_is_trained_and_measured_with_its_tokens(folder, tmp_path, capsys):
    assert run(*command(folder, tmp_path / "out", "--token-lookup", "--save-steps", "0")) == 0
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "out")
    assert sae.W_token.any()
    assert sae.config.lookup_tokenizer == str(folder / "lm")
    common = ["--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--use-cpu", "--json"]
    sizes = ["--eval-tokens", "400", "--ce-tokens", "0", "--stories", "0", "--baselines", "pca", "--metrics", "core"]
    capsys.readouterr()
    assert run("eval", str(tmp_path / "out"), *common, *sizes, "--output-dir", str(tmp_path / "eval")) == 0
    trained = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    core = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["core"]
    levels = core["out"]["measurement"]["levels"]
    assert [level["fve"] for level in levels] == pytest.approx([level["fve"] for level in trained], abs=1e-6)


def test_a_config_file_and_jsonl_give_the_same_run(folder, tmp_path):
    flags = command(folder, tmp_path / "flags", "--save-steps", "0")
    assert run(*flags) == 0
    config = tmp_path / "run.yaml"
    config.write_text(
        f"dataset: {folder / 'texts.jsonl'}\nsite: layers.0\nnum_latents: 64\nprefix_sizes: [8, 1/2, 1]\nk: [4]\n"
        "per-device-train-batch-size: 64\nmax_tokens: 1_280\nblock_tokens: 300\neval_tokens: 400\nsave_steps: 0\n"
        "calibration_tokens: 200\nce_tokens: 200\ncontext_length: 32\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    yaml = ["--config", str(config), "--model", str(folder / "lm"), "--output-dir", str(tmp_path / "yaml")]
    assert run("train", *yaml) == 0
    ours, theirs = load_file(tmp_path / "flags/model.safetensors"), load_file(tmp_path / "yaml/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_activations_are_cached_and_trained_on(folder, tmp_path, capsys):
    cache = tmp_path / "cache"
    arguments = ["--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--site", "layers.0"]
    more = ["--max-tokens", "4k", "--batch-size", "100", "--context-length", "32", "--output-dir", str(cache)]
    more += ["--eval-tokens", "400", "--calibration-tokens", "200"]
    assert run("cache-activations", *arguments, *more) == 0
    assert "Wrote 4,000 tokens" in capsys.readouterr().out
    trained = command(folder, tmp_path / "out", "--dataset", str(cache))
    assert run(*trained) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tokens"] == 400
    assert metrics["ce_tokens"] == 0
    # With text to measure on, cross-entropy is measured too.
    with_text = ["--dataset", str(cache), "--eval-dataset", str(folder / "texts.txt")]
    assert run(*command(folder, tmp_path / "ce", *with_text)) == 0
    assert json.loads((tmp_path / "ce" / "metrics.json").read_text())["ce_tokens"] > 0


def test_activations_are_pushed_and_streamed(folder, tmp_path, capsys, hub):
    """The same SAE as from the folder; in two processes, too. What cannot be is said in a line."""
    cache, repo = tmp_path / "cache", f"{hub.user}/activations"
    arguments = ["--model", str(folder / "lm"), "--dataset", str(folder / "texts.txt"), "--site", "layers.0"]
    arguments += ["--max-tokens", "4k", "--batch-size", "100", "--context-length", "32", "--shard-tokens", "1000"]
    arguments += ["--eval-tokens", "400", "--calibration-tokens", "200", "--output-dir", str(cache)]
    arguments += ["--push-to-hub", repo, "--hub-private"]
    assert run("cache-activations", *arguments) == 0
    shown = capsys.readouterr().out
    assert f"Pushed: {hub.endpoint}/datasets/{repo}/commit/" in shown
    assert shown.endswith(f"hf-msae train --dataset {repo} --model {folder / 'lm'}\n")
    assert hub.repo(repo, "dataset").private
    first = hub.repo(repo, "dataset").at("main").sha
    assert run("cache-activations", *arguments) == 2
    assert f"`hf-msae push {cache} {repo}` publishes it" in capsys.readouterr().err
    assert run("push", str(cache), repo) == 0
    assert run(*command(folder, tmp_path / "folder", "--dataset", str(cache))) == 0
    capsys.readouterr()
    streamed = command(folder, tmp_path / "streamed", "--dataset", repo, "--dataset-revision", first)
    assert run(*streamed) == 0
    assert "--dataset ... " in " ".join(capsys.readouterr().out.split())
    again = command(folder, tmp_path / "two", "--dataset", repo, "--per-device-train-batch-size", "32")
    status, written = run_command(2, again, tmp_path / "two.output")
    assert status == 0, written
    ours, theirs, two = (load_file(tmp_path / at / "model.safetensors") for at in ("streamed", "folder", "two"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ((two["W_dec"] - theirs["W_dec"]).abs() > 1e-2).float().mean() < 0.05
    for refused in (["encode", str(tmp_path / "folder")], ["eval", str(tmp_path / "folder")]):
        flags = [repo] if refused[0] == "encode" else ["--dataset", repo]
        assert run(*refused, *flags, "--output-dir", str(tmp_path / "x")) == 2
        assert f"{repo} is an activation cache and holds no text" in capsys.readouterr().err
    assert run("push", str(cache), repo, "--create-pr") == 2
    assert "in one commit to its main branch; leave out --create-pr" in capsys.readouterr().err


def test_killed_between_checkpoints_it_resumes_to_the_same_bits(folder, tmp_path):
    """SIGKILL to a real process as soon as it has taken steps after its second checkpoint."""
    arguments = ["--save-steps", "40", "--logging-steps", "1", "--max-tokens", "12_800"]
    whole = start_command(command(folder, tmp_path / "whole", *arguments), tmp_path / "whole.output")
    victim = start_command(command(folder, tmp_path / "killed", *arguments), tmp_path / "killed.output")
    log = tmp_path / "killed" / "training_log.jsonl"
    until(lambda: (log.exists() and '"step": 90,' in log.read_text()) or not victim.is_alive())
    victim.kill()
    victim.join(HANG_SECONDS)
    assert victim.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-80").is_dir()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = command(folder, tmp_path / "killed", *arguments, "--resume-from-checkpoint")
    status, written = run_command(1, again, tmp_path / "resumed.output")
    assert status == 0, written
    whole.join(HANG_SECONDS)
    assert whole.exitcode == 0, (tmp_path / "whole.output").read_text()
    ours = load_file(tmp_path / "whole" / "model.safetensors")
    theirs = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_train_and_save_once(folder, tmp_path):
    """Started by torch's launcher, as a user does it."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "hf_msae.cli")
    trained = subprocess.run(
        [sys.executable, *launcher, *command(folder, tmp_path / "two", "--save-steps", "5")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("Saved to") == 1
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["steps"] == 10  # 1,280 tokens in steps of 2 x 64
    state = json.loads((tmp_path / "two" / "checkpoint-10" / "trainer_state.json").read_text())
    assert [feed["batches"]["settings"]["shard"] for feed in state["feeds"]] == [0, 1]
    assert MatryoshkaSAE.from_pretrained(tmp_path / "two").config.num_latents == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "./nowhere"], "There is no model at ./nowhere"),
        (["--dataset", "/nowhere/texts.txt"], "/nowhere/texts.txt"),
        (["--text-column", "body", "--dataset", "JSONL"], "body"),
        (["--site", "layers.9"], "layers.9"),
        (["--site", "layrs.0"], "layers.0"),
        (["--context-length", "4096"], "context_length=4096 is more than the 64 positions"),
        (["--prefix-sizes", "64", "8"], "strictly increasing"),
        (["--k", "0"], "k must be above 0"),
        (["--prefix-sizes", "half"], "'half' is neither"),
        (["--max-tokens", "10"], "less than one batch"),
        (["--eval-split", "test"], "single file without splits"),
    ],
)
def test_bad_input_is_one_clear_line(folder, tmp_path, capsys, change, message):
    change = [str(folder / "texts.jsonl") if value == "JSONL" else value for value in change]
    base = command(folder, tmp_path / "out")
    if change[0] in ("--prefix-sizes", "--k", "--site"):  # these add to what was given: leave that out
        start = base.index(change[0])
        stop = next(i for i in range(start + 1, len(base)) if base[i].startswith("--"))
        base = base[:start] + base[stop:]
    assert run(*base, *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_without_a_dataset_is_refused(folder, capsys):
    assert run("train", "--model", str(folder / "lm")) == 2
    assert "needs a --dataset" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "cache-activations" in text
    assert "accelerate launch" in text
    assert run("trian") == 2
    assert run("--version") == 0
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    assert "--prefix-sizes" in text
    assert "--prefix_sizes" not in text


def test_prefix_sizes_as_numbers_and_shares():
    assert parse_prefix_sizes(["1/16", "0.5", "1"], 64) == [4, 32, 64]
    assert parse_prefix_sizes(["2_048", "8192"], 8192) == [2048, 8192]
    assert parse_prefix_sizes([], 64) == []
