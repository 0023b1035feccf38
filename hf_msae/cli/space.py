"""`hf-msae space`: the Gradio page of an SAE, on this machine or as a Space on the Hub.

The app is `spaces/steering/` of the repository. It is no part of what hf_msae imports: it is run as a Space runs it,
as a script with a `space.json`, from the checkout or from the copy that a wheel carries as `hf_msae/space/`.
"""

import importlib.util
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, SpaceCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

import hf_msae.modeling
from hf_msae.cli.parser import build_parser, by_place, parse
from hf_msae.errors import InputError
from hf_msae.hub.index import list_saes
from hf_msae.worlds.stories import STORIES

DESCRIPTION = """\
`space run SAE` shows an SAE in the browser: steer with its latents, explore texts, walk its tree, compare levels.
`space push REPO SAE` publishes the same page as a Space on the Hub, for SAEs that are there."""
SETTINGS_VARIABLE = "MSAE_SPACE"
SETTINGS_NAME = "space.json"
IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.pyc", SETTINGS_NAME)


@dataclass
class SpaceArguments:
    """What is shown, and where."""

    _argument_group_name = "space"
    _positional = ("action", "names")

    action: Literal["run", "push"] = field(metadata={"help": "Show it on this machine, or publish it."})
    names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "SAEs to choose from, Hub repos or (with run) folders; the first opens. With push, the Space's "
            "name, owner/name, stands before them."
        },
    )
    meta_sae: str | None = field(default=None, metadata={"help": "A meta-SAE of the first one, for the Compare tab."})
    title: str = field(default="Matryoshka SAE", metadata={"help": "Title of the page."})
    private: bool = field(default=False, metadata={"help": "With push: make a new Space private."})
    port: int | None = field(default=None, metadata={"help": "With run: the port. Default: the first free from 7860."})


def run(arguments: list[str]) -> None:
    """Parse, then show or publish."""
    (args,) = parse(build_parser("space", DESCRIPTION, (SpaceArguments,)), by_place("space", arguments))
    if args.action == "run":
        if not args.names:
            raise InputError("`space run` needs the SAE to show, a folder or a Hub repo. (`hf-msae demo` needs none.)")
        run_space(args.names, title=args.title, meta_sae=args.meta_sae, port=args.port)
        return
    if len(args.names) < 2:
        raise InputError("`space push` needs the Space's name and an SAE: hf-msae space push OWNER/NAME OWNER/SAE.")
    repo, *saes = args.names
    url = push_space(repo, saes, title=args.title, meta_sae=args.meta_sae, private=args.private)
    print(f"Pushed the Space: {url}")


def space_folder() -> Path:
    """Where the app lies: in the checkout, or in the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "spaces" / "steering", package / "space"):
        if (folder / "app.py").is_file():
            return folder
    raise InputError(f"The Space's files are missing from {package}; install hf_msae again.")


def run_space(
    saes: Sequence[str], *, title: str = "Matryoshka SAE", meta_sae: str | None = None, port: int | None = None
) -> None:
    """Serve the page until interrupted. Raises ValueError before loading anything where there is no such SAE, or no
    Gradio.
    """
    check_gradio()
    for source in filter(None, (*saes, meta_sae)):
        list_saes(source)
    folder = space_folder()
    if port is not None:
        os.environ["GRADIO_SERVER_PORT"] = str(port)
    # Gradio otherwise asks its makers for its newest version, which a machine without a network cannot.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / SETTINGS_NAME
        path.write_text(_settings(saes, title, meta_sae), encoding="utf-8")
        os.environ[SETTINGS_VARIABLE] = str(path)
        sys.path.insert(0, str(folder))
        runpy.run_path(str(folder / "app.py"), run_name="__main__")


def check_gradio() -> None:
    """Raises ValueError where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("The page needs Gradio: pip install 'hf-msae[space]'")


def push_space(
    repo: str,
    saes: Sequence[str],
    *,
    title: str = "Matryoshka SAE",
    meta_sae: str | None = None,
    private: bool = False,
) -> str:
    """Publish the page as a Space in one commit, with a copy of hf_msae beside it; returns its address.

    Raises ValueError for an SAE that is not on the Hub, without a token, and where the Hub refuses.
    """
    for source in filter(None, (*saes, meta_sae)):
        if Path(source).exists():
            raise InputError(
                f"{source} is a folder of this machine, which a Space cannot read; publish it (`hf-msae push {source} "
                "OWNER/NAME`) and give its repo."
            )
    models = _language_models(saes)
    if get_token() is None:
        raise InputError("A push needs a token that may write: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="hf_msae")
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "space"
        shutil.copytree(space_folder(), draft, ignore=IGNORED)
        copy_package(draft / "hf_msae")
        (draft / SETTINGS_NAME).write_text(_settings(saes, title, meta_sae), encoding="utf-8")
        card = SpaceCard.load(draft / "README.md")
        card.data.title, card.data.models = title, [*saes, *models]
        card.save(draft / "README.md")
        try:
            space = api.create_repo(
                repo, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True
            )
            api.upload_folder(
                repo_id=space.repo_id, repo_type="space", folder_path=draft, commit_message=f"Show {', '.join(saes)}"
            )
        except (HfHubHTTPError, HFValidationError) as error:
            words = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise InputError(
                f"The Hub refused the Space {repo}: {words} The name is owner/name, and the token must be allowed to "
                "write there (`hf auth login`)."
            ) from error
    return str(space)


def _language_models(saes: Sequence[str]) -> list[str]:
    """The repos of the language models that these SAEs read. Raises ValueError for one that no Space could load."""
    names = {entry.base_model for source in saes for entry in list_saes(source)} - {STORIES}
    for name in names:
        try:
            validate_repo_id(name or "")
        except HFValidationError as error:
            raise InputError(
                f"One of {', '.join(saes)} reads the language model {name!r}, which is no repo on the Hub, so a Space "
                "could not load it. Publish the model and name its repo as `base_model` in the SAE's config.json."
            ) from error
    return sorted(name for name in names if name)


def copy_package(folder: Path) -> None:
    """Copy hf_msae as it is installed here, so that a Space runs the code that pushed it, released or not."""
    package, modeling = Path(hf_msae.__file__).parent, Path(hf_msae.modeling.__file__).parent
    space = shutil.ignore_patterns("space", "modeling")

    def ignored(path: str, names: list[str]) -> set[str]:
        # At the top lie, in a wheel, the Space's own files; and the model's, which a checkout has elsewhere.
        return IGNORED(path, names) | (space(path, names) if Path(path) == package else set())

    shutil.copytree(package, folder, ignore=ignored)
    shutil.copytree(modeling, folder / "modeling", ignore=IGNORED)


def _settings(saes: Sequence[str], title: str, meta_sae: str | None) -> str:
    return json.dumps({"saes": list(saes), "meta_sae": meta_sae, "title": title}, indent=2) + "\n"
