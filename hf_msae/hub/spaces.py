"""The Space: where its files lie, run on this machine, and published.

It is no part of what hf_msae imports: it is run as a Space runs it, as a script with a `space.json`, from the checkout
or from the copy that a wheel carries as `hf_msae/space/`.
"""

import importlib.util
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_msae import modeling
from hf_msae.errors import InputError
from hf_msae.hub.index import list_saes
from hf_msae.worlds.stories import STORIES

SETTINGS_VARIABLE = "MSAE_SPACE"
SETTINGS_NAME = "space.json"
IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.pyc", SETTINGS_NAME)


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
    """Serve the page until interrupted.

    Args:
        saes: SAEs to show: folders or repos.
        title: Title of the page.
        meta_sae: A meta-SAE to show beside them.
        port: Port of the server; Gradio's by default.

    Raises:
        NoSAEError: There is no such SAE; nothing was loaded yet.
        InputError: Gradio is not installed.
    """
    check_gradio()
    check_saes([*filter(None, (*saes, meta_sae))])
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


def check_saes(saes: Sequence[str]) -> None:
    """Raises NoSAEError where one of these folders or repos holds no SAE."""
    for source in saes:
        list_saes(source)


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
    package, model = Path(__file__).resolve().parents[1], Path(modeling.__file__).parent
    space = shutil.ignore_patterns("space", "modeling")

    def ignored(path: str, names: list[str]) -> set[str]:
        # At the top lie, in a wheel, the Space's own files; and the model's, which a checkout has elsewhere.
        return IGNORED(path, names) | (space(path, names) if Path(path) == package else set())

    shutil.copytree(package, folder, ignore=ignored)
    shutil.copytree(model, folder / "modeling", ignore=IGNORED)


def _settings(saes: Sequence[str], title: str, meta_sae: str | None) -> str:
    return json.dumps({"saes": list(saes), "meta_sae": meta_sae, "title": title}, indent=2) + "\n"
