"""A steering as data: kept and published as `steering.json` beside the SAE that it belongs to.

A file holds several, each under its name, so that a repo offers presets. It names latents by index, so it means
something only beside its own SAE; in a repo of several SAEs it lies at the root, and edits name the SAE's folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.atomic_files import atomic_file
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.untrusted import inside, parse_json
from hf_msae.steering.context import steering_context
from hf_msae.steering.edits import Edit, LatentEdit, PrefixEdit
from hf_msae.steering.gates import Gate, SteeringError
from hf_msae.steering.positions import Positions, check_positions

STEERING_NAME = "steering.json"
VERSION = 1
# What tells that a folder holds an SAE, or several.
SAE_FILES = ("config.json", "sae_index.json")


@dataclass(frozen=True)
class Steering:
    """What is steered and where in the text, without the models. No edits mean no steering.

    positions: as in `steer`, but for a mask, which belongs to one text.
    Raises SteeringError for positions that are none.
    """

    edits: Sequence[Edit] = ()
    positions: Positions = "all"
    name: str = "default"
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        check_positions(self.positions)
        if not (isinstance(self.name, str) and isinstance(self.description, str)):
            raise SteeringError(f"name and description are texts, got {self.name!r:.80}, {self.description!r:.80}.")
        if isinstance(self.positions, Tensor):
            raise SteeringError(
                "a mask of positions belongs to one text and cannot be kept; give a slice, or use steer."
            )

    def on(
        self,
        model: PreTrainedModel,
        saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE],
        special_ids: Iterable[int] | None = None,
    ) -> AbstractContextManager[None]:
        """The context in which a model is steered so; `saes` by the names that the edits use."""
        saes = saes if isinstance(saes, Mapping) else {"": saes}
        return steering_context(model, saes, self.edits, positions=self.positions, special_ids=special_ids)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        positions = self.positions
        span = (
            {"start": positions.start, "stop": positions.stop, "step": positions.step}
            if isinstance(positions, slice)
            else None
        )
        return {
            "name": self.name,
            "description": self.description,
            "positions": span or positions,
            "edits": [_written(edit) for edit in self.edits],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Steering":
        """The inverse of `to_dict`. Raises SteeringError for anything that it does not write."""
        known = _known(cls, values)
        if isinstance(known.get("positions"), Mapping):
            span = known["positions"]
            known["positions"] = slice(span.get("start"), span.get("stop"), span.get("step"))
        known["edits"] = [_edit(edit) for edit in known.get("edits", ())]
        return cls(**known)


def save_steering(steering: Steering, folder: str | Path) -> Path:
    """Write a steering into the `steering.json` of an SAE's folder; one of the same name there is replaced.

    Raises SteeringError where the folder holds no SAE. The file is whole at every moment.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in SAE_FILES):
        raise SteeringError(f"{folder} holds no SAE; a steering names latents, so save it where its SAE is saved.")
    path = folder / STEERING_NAME
    before = _parse(path.read_bytes(), str(folder)) if path.is_file() else {}
    with atomic_file(path) as draft:
        draft.write_text(_format({**before, steering.name: steering}), encoding="utf-8")
    return path


def load_steerings(source: str | Path, *, subfolder: str = "", **hub: Any) -> dict[str, Steering]:
    """All steerings beside an SAE in a folder or a Hub repo, by name.

    `hub` takes `revision`, `token`, `cache_dir`, `local_files_only`. Raises SteeringError where there are none, or
    where the file is not one of these.
    """
    where = "/".join(filter(None, (str(source), subfolder)))
    if Path(source).is_dir():
        path = Path(source) / inside(subfolder) / STEERING_NAME
        if not path.is_file():
            raise SteeringError(f"{where} has no {STEERING_NAME}; save_steering writes one.")
        return _parse(path.read_bytes(), where)
    try:
        path = Path(hf_hub_download(str(source), STEERING_NAME, subfolder=inside(subfolder) or None, **hub))
    except EntryNotFoundError as error:
        raise SteeringError(f"{where} has no {STEERING_NAME}; push_steering makes one.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SteeringError(
            f"there is no folder and no Hub repo {source} that you may read; check the spelling, or log in (`hf auth "
            "login`) if it is private."
        ) from error
    return _parse(path.read_bytes(), where)


def load_steering(
    source: str | Path,
    name: str | None = None,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Steering:
    """One steering beside an SAE: the one of this name, or the only one. Raises SteeringError as `load_steerings`."""
    found = load_steerings(
        source,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        what = "several steerings, so a name is needed" if name is None else f"no steering {name!r}"
        raise SteeringError(f"{source} has {what}; there are {', '.join(map(repr, found)) or 'none'}.")
    return found[name]


def load_saes_of(
    steering: Steering, source: str | Path, *, subfolder: str = "", **hub: Any
) -> dict[str, MatryoshkaSAE]:
    """The SAEs in a folder or a Hub repo that a steering's edits name, by these names; `hub` as `load_steerings`."""
    return {
        name: MatryoshkaSAE.from_pretrained(source, subfolder="/".join(filter(None, (subfolder, name))), **hub)
        for name in sorted({edit.sae for edit in steering.edits})
    }


def push_steering(
    steering: Steering,
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Put a steering beside the SAE in a Hub repo, replacing one of the same name; returns the commit's address.

    Raises SteeringError where the repo holds no SAE there, and huggingface_hub's errors where it may not be written.
    """
    api = HfApi(token=token, library_name="hf_msae")
    try:
        info = api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SteeringError(f"there is no model repo {repo_id} that you may read; push the SAE first.") from error
    there = {file.rfilename for file in info.siblings or ()}
    at = {name: "/".join(filter(None, (inside(subfolder), name))) for name in (*SAE_FILES, STEERING_NAME)}
    if not any(at[name] in there for name in SAE_FILES):
        raise SteeringError(f"{repo_id} has no SAE in {subfolder or 'its root'}; push the SAE first.")
    before: dict[str, Steering] = {}
    if at[STEERING_NAME] in there:
        before = load_steerings(repo_id, subfolder=subfolder, revision=info.sha, token=token)
    content = _format({**before, steering.name: steering}).encode()
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(at[STEERING_NAME], content)],
        commit_message=commit_message or f"Steering {steering.name!r}",
        revision=revision,
        create_pr=create_pr,
        # What was read above is what is written over, or the Hub refuses.
        parent_commit=info.sha,
    )
    return commit.pr_url or commit.commit_url


def _format(steerings: Mapping[str, Steering]) -> str:
    listed = [steering.to_dict() for steering in steerings.values()]
    return json.dumps({"version": VERSION, "steerings": listed}, indent=2) + "\n"


def _parse(text: bytes, where: str) -> dict[str, Steering]:
    try:
        content = parse_json(text, "it")
        if content["version"] > VERSION:
            raise SteeringError(f"it has version {content['version']}, later than {VERSION}: update hf_msae")
        found = {one.name: one for one in map(Steering.from_dict, content["steerings"])}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise SteeringError(
            f"{STEERING_NAME} of {where} cannot be read ({type(error).__name__}: {error!s:.400})."
        ) from error
    return found


def _written(edit: Edit) -> dict[str, Any]:
    """As JSON has it; gates only where there are some, so that versions that know none read the rest."""
    return {name: value for name, value in asdict(edit).items() if name != "when" or value}


def _edit(values: Mapping[str, Any]) -> Edit:
    kind = PrefixEdit if isinstance(values, Mapping) and "level" in values else LatentEdit
    known = _known(kind, values)
    if "when" in known:
        known["when"] = [Gate(**_known(Gate, gate)) for gate in known["when"]]
    return kind(**known)


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise SteeringError(f"a {kind.__name__} is an object {{...}}, got {values!r:.80}")
    names = [field.name for field in fields(kind)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise SteeringError(f"unknown key {unknown[0]!r}; a {kind.__name__} has {', '.join(names)}")
    return dict(values)
