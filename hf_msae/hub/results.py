"""What a training run or `save_pretrained` left in a folder, read for publishing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_msae.hub.card import choose_latent, dataset_name
from hf_msae.hub.curves import NAME as CURVES_NAME
from hf_msae.hub.curves import can_draw, draw_curves
from hf_msae.hub.index import CONFIG_NAME, NoSAEError, describe_contents, find_entries, is_ours
from hf_msae.metrics import LevelMetrics, Measurement
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.process_wide import no_transformers_bars

WEIGHTS_NAME = "model.safetensors"
METRICS_NAME = "metrics.json"
ARGUMENTS_NAME = "training_arguments.json"
LOG_NAME = "training_log.jsonl"
CARD_NAME = "README.md"
# What a push may take away again where a later one has none.
GENERATED = (METRICS_NAME, ARGUMENTS_NAME, LOG_NAME, CURVES_NAME)
# Arguments that name places on the author's machine.
PRIVATE_ARGUMENTS = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "report_to", "run_name")
RUN_FACTS = ("dataset", "training_tokens", "steps", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class Result:
    """One SAE: the files to publish by name (a path, or the content), and what its card says.

    `card` is the text of the card that lies beside it, None where there is none.
    """

    files: Mapping[str, Path | bytes]
    config: MatryoshkaSAEConfig
    measurement: Measurement | None
    training: Mapping[str, Any]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    latent: int | None
    card: str | None = None
    origin: str | None = None


def save_quietly(sae: MatryoshkaSAE, folder: Path) -> None:
    """`save_pretrained` without its progress bar, which would tear others apart."""
    with no_transformers_bars():
        sae.save_pretrained(folder)


def grid_folders(folder: Path) -> dict[str, Path]:
    """The SAEs' folders by the name that they get in a repo: "" for the folder itself where it is one.

    Raises `NoSAEError` where there is none.
    """
    if (folder / CONFIG_NAME).is_file() and is_ours(folder / CONFIG_NAME):
        return {"": folder}
    entries = find_entries(folder)
    if not entries:
        raise NoSAEError(f"{folder} holds no Matryoshka SAE. {describe_contents(folder)}")
    return {entry.subfolder: folder / entry.subfolder for entry in entries}


def read_result(folder: Path, beside: Path | None = None) -> Result:
    """Read one SAE's folder. `beside` is where it was loaded from, if the numbers of its run lie there instead.

    Raises `NoSAEError` where the folder lacks weights or code, or where the weights are truncated.
    """
    config = MatryoshkaSAEConfig.from_json_file(folder / CONFIG_NAME)
    max_activation, firing_rate = _read_statistics(folder, config)
    code = {path.name: path for path in sorted(folder.glob("*.py"))}
    if not code:
        raise NoSAEError(
            f"{folder} lacks the code that loads the SAE where hf_msae is not installed. Load it and save it again "
            "with save_pretrained."
        )
    run = beside if beside is not None else folder
    metrics = _read_json(run / METRICS_NAME)
    by_run = _measured_by_run(metrics, config)
    training = _run_facts(metrics) if by_run is not None else {}
    arguments = _public_arguments(_read_json(run / ARGUMENTS_NAME)) if training else {}
    log = _read_log(run) if training else []
    files: dict[str, Path | bytes] = {CONFIG_NAME: folder / CONFIG_NAME, WEIGHTS_NAME: folder / WEIGHTS_NAME, **code}
    if training:
        levels = [level for level in metrics["levels"] if level["prefix"] in config.prefix_sizes]
        files[METRICS_NAME] = _as_json(metrics | training | {"levels": levels})
        files[ARGUMENTS_NAME] = _as_json(arguments)
    if log:
        files[LOG_NAME] = "".join(json.dumps(entry) + "\n" for entry in log).encode()
    curves = draw_curves(log, config.prefix_sizes) if log and can_draw() else None
    if curves is not None:
        files[CURVES_NAME] = curves
    card = run / CARD_NAME
    return Result(
        files=files,
        config=config,
        measurement=by_run or _measured_in_config(config, firing_rate),
        training=training,
        arguments=arguments,
        versions=metrics.get("versions", {}),
        latent=choose_latent(max_activation, firing_rate),
        card=card.read_bytes().decode() if card.is_file() else None,
    )


def _read_statistics(folder: Path, config: MatryoshkaSAEConfig) -> tuple[Tensor, Tensor]:
    """Maximum activation and firing rate per latent, (num_latents,), from weights that are whole and fit the
    configuration.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise NoSAEError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}; save the SAE again.")
    try:
        with safe_open(path, framework="pt") as file:
            shape = tuple(file.get_slice("W_dec").get_shape())
            statistics = file.get_tensor("max_activation"), file.get_tensor("firing_rate")
    except SafetensorError as error:
        raise NoSAEError(
            f"{path} ({path.stat().st_size:,} bytes) does not hold the whole weights of an SAE ({error}); fetch or "
            "save it again."
        ) from error
    if shape != (config.num_latents, config.hidden_size):
        raise NoSAEError(
            f"{folder}: {CONFIG_NAME} is of an SAE of {config.num_latents} latents and hidden size "
            f"{config.hidden_size}, but W_dec in {WEIGHTS_NAME} is {shape}. They do not belong together."
        )
    return statistics


def _measured_by_run(metrics: Mapping[str, Any], config: MatryoshkaSAEConfig) -> Measurement | None:
    """The run's numbers for the levels of this SAE, which may be a prefix of what was trained; None where they are not
    of it.
    """
    levels = [LevelMetrics(**level) for level in metrics.get("levels", ()) if level["prefix"] in config.prefix_sizes]
    recorded = (config.measured or {}).get("fve", ())
    if not levels or [round(level.fve, 5) for level in levels] != list(recorded):
        return None
    names = ("tokens", "ce_tokens", "ce_clean", "ce_zero", "ce_mean", "outliers")
    return Measurement(levels, **{name: metrics[name] for name in names if name in metrics})


def _measured_in_config(config: MatryoshkaSAEConfig, firing_rate: Tensor) -> Measurement | None:
    """The numbers that the SAE itself carries."""
    measured = config.measured
    if measured is None or not measured.get("fve"):
        return None
    dead = [(firing_rate[:size] == 0).double().mean().item() for size in config.prefix_sizes]
    rows = zip(config.prefix_sizes, measured["l0"], measured["fve"], dead, strict=False)
    return Measurement([LevelMetrics(*row) for row in rows], measured["tokens"])


def _run_facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the card tells of the run; empty where the file is of an evaluation and not of a run."""
    if not metrics.keys() >= {*RUN_FACTS}:
        return {}
    return {name: metrics[name] for name in RUN_FACTS} | {"dataset": dataset_name(metrics["dataset"])}


def _public_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in PRIVATE_ARGUMENTS}


def _read_log(run: Path) -> list[dict[str, Any]]:
    """The SAE's entries of its run's log, which for a grid lies one folder up and names the SAE in each line."""
    if (run / LOG_NAME).is_file():
        return _read_lines(run / LOG_NAME)
    if not (run.parent / LOG_NAME).is_file():
        return []
    entries = [entry for entry in _read_lines(run.parent / LOG_NAME) if entry.get("sae") == run.name]
    return [{key: value for key, value in entry.items() if key != "sae"} for entry in entries]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # A run that was killed may have left half a line at the end.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise NoSAEError(f"{path} is no valid JSON ({error}); mend it or take it away.") from error
    if not isinstance(content, dict):
        raise NoSAEError(f"{path} must hold a JSON object, got a {type(content).__name__}; mend it or take it away.")
    return content


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
