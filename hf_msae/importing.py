"""How the package is imported: names on demand, the model where a checkout has it, and its registration.

torch and transformers take seconds to import, so `import hf_msae` imports neither: a name that the package shows is
looked up when it is first used. Yet `AutoModel` must know the model as soon as somebody who imported hf_msae uses
transformers, in whatever order the two were imported. So a finder of Python's own kind waits for transformers, and
lets `hf_msae.modeling`, which registers the model, follow right after it.

The same finder knows that in a checkout the files of `hf_msae.modeling` lie beside the package and not in it. Without
it, Python that is started in a checkout's root finds the folder `hf_msae/` before any installed copy, and no model in
it.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

MODEL, TRANSFORMERS = "hf_msae.modeling", "transformers"
PACKAGE = Path(__file__).resolve().parent
# transformers puts another module into its place while it is being imported; a thread that waited for it meanwhile is
# left with one that has no names.
_ONE_AT_A_TIME = threading.RLock()


class _GetAttr(Protocol):
    def __call__(self, name: str) -> Any: ...


class _Dir(Protocol):
    def __call__(self) -> list[str]: ...


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[_GetAttr, _Dir]:
    """The `__getattr__` and `__dir__` of a package whose names are imported when they are first used (PEP 562).

    Args:
        package: the package's `__name__`.
        homes: for each name the module that it is taken from; a room of the package itself is its own home.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with _ONE_AT_A_TIME:
            home = import_module(homes[name])
        return home if homes[name] == f"{package}.{name}" else getattr(home, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return look_up, names


class Finder(MetaPathFinder):
    """Finds the model beside the package in a checkout, registers it, and lets it follow transformers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As Python asks for it; None for all other modules."""
        if fullname not in (MODEL, TRANSFORMERS):
            return None
        spec = _beside() if fullname == MODEL else None
        # Who only asks whether a module is there gets a specification, too, so this finder stays where it is.
        others = (finder for finder in sys.meta_path if finder is not self)
        while spec is None and (finder := next(others, None)) is not None:
            spec = finder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, register if fullname == MODEL else follow)
        return spec


def _beside() -> ModuleSpec | None:
    folder = PACKAGE.parent / "modeling"
    if (PACKAGE / "modeling").is_dir() or not (folder / "__init__.py").is_file():
        return None
    return spec_from_file_location(MODEL, folder / "__init__.py", submodule_search_locations=[str(folder)])


class _Followed(Loader):
    """Loads a module as its own loader does, and then calls something."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()


def register() -> None:
    """Make the model known to transformers, and hand it what it must not import, because it lies above it."""
    from transformers import AutoConfig, AutoModel

    modeling, process_wide = import_module(MODEL), import_module("hf_msae.process_wide")
    config, model = modeling.MatryoshkaSAEConfig, modeling.MatryoshkaSAE
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    # Every checkpoint takes these files along and names them in its `auto_map`, for readers who lack hf_msae.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    model.publishing_module, model.formats_module = "hf_msae.hub.publishing", "hf_msae.formats.conversion"
    model.loading = process_wide.loading


def follow() -> None:
    """Import the model where transformers is there and the model is not, nor on its way."""
    if TRANSFORMERS in sys.modules and MODEL not in sys.modules:
        import_module(MODEL)


def install() -> None:
    """Begin to watch imports. Called by the package once, before anything else of it is imported."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    follow()
