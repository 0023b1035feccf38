"""The fields of `MatryoshkaSAEConfig` as arguments, read from its source, so that each is declared once.

Importing the configuration would import transformers and torch, which takes seconds, before the first flag is read.
The source says what a command needs: names, types, defaults, and, in the docstring, what each field is for.
"""

import ast
import importlib.util
import re
from dataclasses import Field, field
from pathlib import Path
from typing import Any

CLASS, FILE = "MatryoshkaSAEConfig", "configuration_matryoshka_sae.py"
# The section of its docstring, the last one, whose fields the run and the model say.
SAID_BY_THE_RUN = "> Where the activations come from"
# Where the types of the configuration allow several, the one that text is turned into.
TYPES: dict[str, Any] = {
    "bool": bool | None,
    "int": int | None,
    "int | None": int | None,
    "float | int": float | None,
    "float | int | None": float | None,
    "str": str | None,
}


def read_config_fields(without: frozenset[str] = frozenset()) -> list[tuple[str, Any, "Field[Any]"]]:
    """Fields as `dataclasses.make_dataclass` takes them, each None until it is given.

    Args:
        without: names of fields that are left out, beside those that the run says.

    Returns:
        Name, type and field of each, in the order of the configuration.
    """
    tree = ast.parse(_source().read_text(encoding="utf-8"))
    (body,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS]
    words = _read_help((ast.get_docstring(body) or "").partition(SAID_BY_THE_RUN)[0])
    found = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id in without or node.target.id not in words:
                continue
            name, written = node.target.id, ast.unparse(node.value) if node.value is not None else "None"
            default = "" if written == "None" else f" Default: {written.strip(chr(39)).replace(' / ', '/')}."
            metadata = {"help": f"{words[name]}{default}"}
            empty: Any = field(default=None, metadata=metadata)  # mypy takes it for its default
            found.append((name, TYPES[ast.unparse(node.annotation)], empty))
    return found


def _source() -> Path:
    spec = importlib.util.find_spec("hf_msae.modeling")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("hf_msae.modeling is missing; install hf_msae again.")
    return Path(spec.submodule_search_locations[0]) / FILE


def _read_help(docstring: str) -> dict[str, str]:
    """What the docstring says of each field, in one line; several may share a heading."""
    found: dict[str, str] = {}
    for heading, text in re.findall(r"^(\w+ \(.*):\n((?: {4,}.*\n?)+)", docstring, re.MULTILINE):
        # argparse formats help with %.
        line = " ".join(text.split()).replace("`", "").replace('"', "").replace("%", "%%")
        found |= dict.fromkeys(re.findall(r"(\w+) \(`", heading), line)
    return found
