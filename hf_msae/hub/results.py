"""What a training run or `save_pretrained` left in a folder, read for publishing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_msae import modeling
from hf_msae.hub.card import choose_latent, dataset_name, public_name
from hf_msae.hub.curves import NAME as CURVES_NAME
from hf_msae.hub.curves import can_draw, draw_curves
from hf_msae.hub.index import CONFIG_NAME, NoSAEError, describe_contents, find_entries, is_ours
from hf_msae.hub.links import refuse_links_out
from hf_msae.metrics import LevelMetrics, Measurement
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.prefix_loading import WEIGHTS_NAME, read_state
from hf_msae.modeling.untrusted import check_values, parse_json, read_json
from hf_msae.process_wide import no_transformers_bars

METRICS_NAME = "metrics.json"
ARGUMENTS_NAME = "training_arguments.json"
LOG_NAME = "training_log.jsonl"
CARD_NAME = "README.md"
# Fields of a configuration that may name a folder of the machine where it was trained.
NAMES_OF_MODELS = ("base_model", "adapter", "lookup_tokenizer")
# The code that lies beside every SAE; other files of code, whoever put them there, are no part of one.
CODE_NAMES = frozenset(path.name for path in Path(modeling.__file__).parent.glob("*.py")) - {"__init__.py"}
# What a push may take away again where a later one has none.
GENERATED = (METRICS_NAME, ARGUMENTS_NAME, LOG_NAME, CURVES_NAME)
# Arguments that name places on the author's machine.
PRIVATE_ARGUMENTS = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "report_to", "run_name")
# What is drawn and written of them, by its type.
NUMBERS = ("tokens", "ce_tokens", "ce_clean", "ce_zero", "ce_mean", "training_tokens", "steps", "learning_rate")
OTHERS = {"dataset": str, "versions": dict, "ce_absent": str}
DRAWN = ("tokens", "loss", "l0", "dead")
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


def read_result(folder: Path, beside: Path | None = None, root: Path | None = None) -> Result:
    """Read one SAE's folder for publishing.

    Args:
        folder: The SAE's folder.
        beside: Where the SAE was loaded from, if the numbers of its run lie there instead.
        root: The folder that the user named, where that is another one.

    Returns:
        What is published.

    Raises:
        NoSAEError: The folder lacks weights or code, or the weights are damaged.
        InputError: A file is a link that leads out of the folder. Only the weights may be one: they are looked at
            whole.
    """
    try:
        config = MatryoshkaSAEConfig.from_json_file(folder / CONFIG_NAME)
    except ValueError as error:
        raise NoSAEError(str(error)) from error
    content: Path | bytes = folder / CONFIG_NAME
    recorded = {key: name for key in NAMES_OF_MODELS if (name := getattr(config, key)) is not None}
    public = {key: public_name(name) for key, name in recorded.items()}
    if public != recorded:
        for key, name in public.items():
            setattr(config, key, name)
        content = _as_json(_read_json(folder / CONFIG_NAME) | public)
    max_activation, firing_rate = _read_statistics(folder, config)
    code = {path.name: path for path in sorted(folder.glob("*.py")) if path.name in CODE_NAMES}
    if not code:
        raise NoSAEError(
            f"{folder} lacks the code that loads the SAE where hf_msae is not installed. Load it and save it again "
            "with save_pretrained."
        )
    run = beside if beside is not None else folder
    refuse_links_out(root or folder, (folder / CONFIG_NAME, *code.values()))
    refuse_links_out(root or run, (run / name for name in (METRICS_NAME, ARGUMENTS_NAME, LOG_NAME, CARD_NAME)))
    metrics = _read_metrics(run / METRICS_NAME)
    by_run = _measured_by_run(metrics, config)
    training = _run_facts(metrics) if by_run is not None else {}
    arguments = public_arguments(_read_json(run / ARGUMENTS_NAME)) if training else {}
    log = _read_log(run) if training else []
    files: dict[str, Path | bytes] = {CONFIG_NAME: content, WEIGHTS_NAME: folder / WEIGHTS_NAME, **code}
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
    """Read maximum activation and firing rate per latent, (num_latents,).

    The weights must be whole and fit the configuration.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise NoSAEError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}; save the SAE again.")
    try:
        state = read_state(folder, config)
        check_values(state, str(path))
    except ValueError as error:
        raise NoSAEError(str(error)) from error
    return state["max_activation"], state["firing_rate"]


def _read_metrics(path: Path) -> dict[str, Any]:
    """The numbers that a run or an evaluation left, of the types that they have there; empty where there are none."""
    metrics = _read_json(path)
    try:
        levels = [LevelMetrics(**level) for level in metrics.get("levels", ())]
        numbers = {name: metrics[name] for name in NUMBERS if metrics.get(name) is not None}
        numbers |= {
            f"{name} of a level": one for level in levels for name, one in asdict(level).items() if one is not None
        }
        wrong = [name for name, value in numbers.items() if type(value) not in (int, float)]
        wrong += [name for name, kind in OTHERS.items() if not isinstance(metrics.get(name, kind()), kind)]
        if wrong:
            raise TypeError(f"{wrong[0]} is of another type")
    except TypeError as error:
        raise NoSAEError(f"{path} is not as a training run writes it ({error}); mend it or take it away.") from error
    return metrics


def _measured_by_run(metrics: Mapping[str, Any], config: MatryoshkaSAEConfig) -> Measurement | None:
    """Give the run's numbers for the levels of this SAE, None where they are not of it.

    The SAE may be a prefix of what was trained.
    """
    levels = [LevelMetrics(**level) for level in metrics.get("levels", ()) if level["prefix"] in config.prefix_sizes]
    recorded = (config.measured or {}).get("fve", ())
    if not levels or [round(level.fve, 5) for level in levels] != list(recorded):
        return None
    names = ("tokens", "ce_tokens", "ce_clean", "ce_zero", "ce_mean", "outliers", "ce_absent")
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
    if not metrics.keys() >= {*RUN_FACTS} or not metrics.get("versions", {}).keys() >= {"torch", "transformers"}:
        return {}
    return {name: metrics[name] for name in RUN_FACTS} | {"dataset": dataset_name(metrics["dataset"])}


def public_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Give a run's arguments without places on the machine where it ran."""
    public = {name: value for name, value in arguments.items() if name not in PRIVATE_ARGUMENTS}
    return public | {name: public_name(public[name]) for name in ("init_from",) if public.get(name)}


def _read_log(run: Path) -> list[dict[str, Any]]:
    """The SAE's entries of its run's log, which for a grid lies one folder up and names the SAE in each line."""
    if (run / LOG_NAME).is_file():
        return _read_lines(run / LOG_NAME)
    if not (run.parent / LOG_NAME).is_file():
        return []
    refuse_links_out(run.parent, [run.parent / LOG_NAME])
    entries = [entry for entry in _read_lines(run.parent / LOG_NAME) if entry.get("sae") == run.name]
    return [{key: value for key, value in entry.items() if key != "sae"} for entry in entries]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log. Raises `NoSAEError` where one is no object of numbers."""
    # A run that was killed may have left half a line at the end.
    lines = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    try:
        entries = [parse_json(line, "a line") for line in lines]
        for entry in entries:
            drawn = [entry[name] for name in DRAWN] if "loss" in entry else []
            drawn += [*entry.get("level_losses", ()), *(level["fve"] for level in entry.get("eval_levels", ()))]
            if any(type(value) not in (int, float) for value in (entry.get("tokens", 0), *drawn)):
                raise TypeError(f"of a step, {', '.join(DRAWN)} are numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoSAEError(f"{path} is no log of a training run ({error}); mend it or take it away.") from error
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise NoSAEError(f"{error} Mend it or take it away.") from error


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
