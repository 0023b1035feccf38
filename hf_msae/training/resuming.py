"""Where a run goes on: from which checkpoint, for how long, and with which documents on how many processes.

Everything that would change a weight must be as it was, with two exceptions, which are what people need when a machine
is gone or a result is not good enough yet: the length of the run, and the number of processes. Their batch sizes
together must stay the same, so that steps, tokens and schedules mean what they meant.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_msae.data import differences
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import CheckpointError, find_checkpoint, read_state
from hf_msae.training.loaders import ActivationLoader
from hf_msae.training.run import Run
from hf_msae.training.schedules import Length

logger = logging.getLogger(__name__)

# Arguments that may differ between a checkpoint's run and the run that resumes it: none of them changes a weight, or
# what they change is taken care of here.
FREE_ARGUMENTS = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "allow_other_data",
        "max_steps",
        "max_tokens",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "shard_latents",
        "eval_steps",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "ddp_timeout",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_private_repo",
        "report_to",
        "run_name",
        "disable_tqdm",
        "use_cpu",
    }
)
# What transformers writes into a configuration when it is saved.
BY_SAVING = frozenset({"architectures", "auto_map", "dtype", "transformers_version"})
FROM_BEGINNING = " It is read from its beginning, but for what is held out."
# What a run finds out, which is no part of what the SAE is.
FOUND_OUT = frozenset({"measured", "norm_limit", "norm_limit_out"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was checked.

    Attributes:
        path: Its folder.
        state: The trainer's state in it.
    """

    path: Path
    state: dict[str, Any]


def choose_checkpoint(run: Run) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` names; read and checked by the main process alone.

    Args:
        run: The run.

    Returns:
        The checkpoint; None where the run begins anew.

    Raises:
        CheckpointError: Where there is none that is undamaged.
    """
    name = run.args.resume_from_checkpoint
    if not name:
        return None
    path = run.on_main(lambda: find_checkpoint(name, run.output_dir, check_state))
    return Checkpoint(path, read_state(path))


# What a trainer's state holds, by example.
STATE_FORM = {
    "step": 1,
    "first_max_steps": 1,
    "extensions": [],
    "tokens": 1,
    "tokens_per_step": 1,
    "arguments": {"max_steps": 1},
    "feeds": [{"epoch": 0, "batches": {}}],
    "skipped_documents": [0],
}


def check_state(state: Any) -> None:
    """Check that a state is of the form that a trainer writes.

    Args:
        state: What was read.

    Raises:
        ValueError: For what is none, in words that go on from the file's name.
    """
    require_form(state, STATE_FORM)
    for pair in state["extensions"]:
        require_form(pair, [0], "extensions")
        if len(pair) != 2:
            raise InputError(f"holds an extension that is no pair: {pair}")
    if min(state["step"], state["tokens"], state["first_max_steps"]) < 0:
        raise InputError("counts steps or tokens below zero")
    if "max_tokens" not in state["arguments"] or not state["feeds"] or state["tokens_per_step"] < 1:
        raise InputError("lacks a run's length, its place in the data, or its tokens per step")
    require_form(state.get("threads", 1), 1, "threads")
    data = state.get("data", {"train": {}, "eval": None})
    require_form(data, {"train": {}})
    if not isinstance(data.get("eval", 0), dict | None):
        raise InputError("does not say which data was measured on")


def require_form(value: Any, example: Any, name: str = "it") -> None:
    """Check that a value is of an example's form: dicts with (at least) its keys, lists of items like its first.

    Args:
        value: The value.
        example: None in it stands for anything, and so does an empty list for its items.
        name: What the value is called in the error.

    Raises:
        ValueError: Where it is not.
    """
    if example is None:
        return
    if type(value) is not type(example) and (type(value), type(example)) != (int, float):
        raise InputError(f"holds for {name} {str(value)[:40]!r}, expected {type(example).__name__}")
    if isinstance(example, dict):
        for key, inner in example.items():
            if key not in value:
                raise InputError(f"has no {key!r} in {name}")
            require_form(value[key], inner, key)
    if isinstance(example, list):
        for item in value:
            require_form(item, example[0] if example else None, name)


def check_same_run(checkpoint: Checkpoint, run: Run, configs: Mapping[Path, MatryoshkaSAEConfig]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        checkpoint: The checkpoint.
        run: This run.
        configs: The SAEs of this run by the folders in which the checkpoint has them.

    Raises:
        CheckpointError: With all that is not as it was.
    """
    now = run.args.to_dict()
    changed = [
        f"{name}: {value!r} then, {now.get(name)!r} now"
        for name, value in checkpoint.state["arguments"].items()
        if name not in FREE_ARGUMENTS and value != now.get(name)
    ]
    then = checkpoint.state["tokens_per_step"]
    if then != run.tokens_per_step:
        changed.append(
            f"tokens in a step, of all processes together: {then:,} then, {run.tokens_per_step:,} now; set "
            "per_device_train_batch_size accordingly"
        )
    for folder, config in configs.items():
        name = "the SAE" if folder == checkpoint.path else folder.name
        if not (folder / "config.json").is_file():
            changed.append(f"{name}: not among the SAEs of the checkpoint")
            continue
        ours, theirs = config.to_diff_dict(), type(config).from_pretrained(folder).to_diff_dict()
        for key in sorted((ours.keys() | theirs.keys()) - BY_SAVING - FOUND_OUT):
            if ours.get(key) != theirs.get(key):
                changed.append(f"{key} of {name}: {theirs.get(key)!r} then, {ours.get(key)!r} now")
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another run ({'; '.join(changed)}). Resume with the arguments of that run, "
            "or start anew in another output directory."
        )
    threads = checkpoint.state.get("threads", torch.get_num_threads())
    if run.device.type == "cpu" and threads != torch.get_num_threads():
        logger.warning(
            "%s was computed with %d threads, and this process has %d: what follows is the same but for rounding. "
            "OMP_NUM_THREADS=%d gives the same bits.",
            checkpoint.path,
            threads,
            torch.get_num_threads(),
            threads,
        )


def check_same_data(
    checkpoint: Checkpoint, train: Mapping[str, Any], evaluation: Mapping[str, Any] | None, allow_other: bool
) -> bool:
    """Compare the data of this run with that of the checkpoint's.

    Args:
        checkpoint: The checkpoint.
        train: The fingerprint of what is trained on.
        evaluation: The fingerprint of what is measured on; None where it is held out of the training data.
        allow_other: Whether other data is allowed, which is then read from its beginning.

    Returns:
        Whether the training data is what the checkpoint's run read, so that it goes on there.

    Raises:
        CheckpointError: For other data that is not allowed.
    """
    then = checkpoint.state.get("data")
    if then is None:
        logger.warning(
            "%s was written before checkpoints said which data they belong to; it is taken for the same.",
            checkpoint.path,
        )
        return True
    found = {
        "to train on": differences(then["train"], train),
        "to measure on": differences(then["eval"] or {}, evaluation or {}),
    }
    changed = "; ".join(f"{what}, {words}" for what, words in found.items() if words)
    if changed and not allow_other:
        raise CheckpointError(
            f"{checkpoint.path} was trained with other data ({changed}). Give the data of that run; or go on with "
            "this, from its beginning, with --allow-other-data (allow_other_data=True)."
        )
    if changed:
        logger.warning(
            "The data is not that of %s (%s).%s", checkpoint.path, changed, FROM_BEGINNING * bool(found["to train on"])
        )
    return not found["to train on"]


# How long


def resumed_length(state: Mapping[str, Any], args: SAETrainingArguments, count: Callable[[], int]) -> Length:
    """The length of a resumed run: as before, or, where `max_steps` or `max_tokens` are others now, counted anew.

    Args:
        state: The trainer's state in the checkpoint.
        args: The arguments of this run.
        count: Counts its steps.

    Returns:
        The length.

    Raises:
        CheckpointError: Where the checkpoint is past the new end.
    """
    length = Length(state["first_max_steps"], tuple((begin, steps) for begin, steps in state["extensions"]))
    then = state["arguments"]
    if (then["max_steps"], then["max_tokens"]) == (args.max_steps, args.max_tokens):
        return length
    steps, done = count(), state["step"]
    if steps < done:
        raise CheckpointError(
            f"The checkpoint is of step {done:,}, past the {steps:,} steps asked for now; give a larger max_steps or "
            "max_tokens, or resume from an earlier checkpoint."
        )
    if steps == length.max_steps:
        return length
    logger.warning(
        "The run has %s steps now, after %s; from step %s on the learning rate rises again from where it was and "
        "follows the schedule of the new length.",
        f"{steps:,}",
        f"{length.max_steps:,}",
        f"{done:,}",
    )
    return Length(length.first, (*length.extensions, (done, steps)))


# Another number of processes


def resume_loader(loader: ActivationLoader, states: Sequence[Mapping[str, Any]]) -> None:
    """Have this process's loader go on where those of all processes stopped, whether they were as many or not.

    Args:
        loader: The loader.
        states: What `state_dict` of all processes' loaders gave; of one, where all were at the same place.
    """
    rank, num_processes = (0, 1) if loader.sliced else (loader.rank, loader.num_processes)
    for state in states:  # each is of the form of a fresh one
        require_form(state, loader.state_dict(), "a place in the data")
    if len(states) == num_processes:
        loader.load_state_dict(states[rank])
        return
    state, words = redistribute(states, rank, num_processes)
    loader.load_state_dict(state)
    if loader.rank == 0:
        logger.warning("%d processes go on with the work of %d. %s", loader.num_processes, len(states), words)


def redistribute(states: Sequence[Mapping[str, Any]], rank: int, num_processes: int) -> tuple[dict[str, Any], str]:
    """Share documents out among another number of processes than those that stopped.

    They are dealt anew from the first one that any process had not used up, so no document is left out.

    Args:
        states: Of the loaders that stopped.
        rank: A process that goes on.
        num_processes: How many go on.

    Returns:
        The state of that process's loader, and, in words, which tokens are read twice or not at all.
    """
    slowest = min(states, key=lambda state: (state["epoch"], _documents(state)["next"]))
    state = copy.deepcopy(dict(slowest))
    batches = state["batches"]
    batches["settings"]["shard"] = rank
    batches["block"] = 1 + max(other["batches"]["block"] for other in states)
    batches["position"] = 0
    batches["num_tokens"] = sum(other["batches"]["num_tokens"] for other in states) // num_processes
    batches["num_filtered"] = sum(other["batches"]["num_filtered"] for other in states) // num_processes
    windows = batches["windows"]
    windows["given"] = 0
    windows["batch"] |= {"carry": [], "num_windows": 0, "num_documents": 0, "num_truncated": 0}
    windows["batch"]["documents"] |= {"rank": rank, "world_size": num_processes}
    return state, _describe(states, _documents(slowest)["next"], slowest["epoch"])


def _documents(state: Mapping[str, Any]) -> dict[str, Any]:
    return state["batches"]["windows"]["batch"]["documents"]


def _describe(states: Sequence[Mapping[str, Any]], first: int, epoch: int) -> str:
    """What was used of the documents from `first` on, and what of those before was not."""
    parts = []
    for rank, state in enumerate(states):
        batches, windows = state["batches"], state["batches"]["windows"]
        ahead = f" of pass {state['epoch'] + 1}" if state["epoch"] != epoch else ""
        numbers = f"number % {len(states)} == {rank}"
        twice = f"documents {first:,} to {_documents(state)['next']:,}{ahead} (exclusive; {numbers})"
        twice += f", {windows['given']:,} windows and {batches['position']:,} tokens after them"
        parts.append(
            f"process {rank} had used {twice}, and leaves out {len(windows['batch']['carry']):,} tokens before"
        )
    return f"Documents are dealt anew from number {first:,} on. What is read twice: {'; '.join(parts)}."
