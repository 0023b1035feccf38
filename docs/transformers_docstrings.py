"""Shows docstrings in the form of transformers as lists, which the reference's generator would print as one paragraph.

The configuration of the model has its fields as `name (type, *optional*): text`, because it is remote code of the Hub
as well, and tools there read that form. mkdocs.yml names this file.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(\w+) \((.+)\):\n((?:    .+\n?)+)", re.MULTILINE)
HEADING = re.compile(r"^> (.+)$", re.MULTILINE)


def as_lists(text: str) -> str:
    """Entries become items of a list, and what transformers marks as quotations becomes headings."""
    text = ENTRY.sub(lambda found: f"- **{found[1]}** ({found[2]}): {' '.join(found[3].split())}\n", text)
    text = HEADING.sub(r"**\1**", text)
    return re.sub(r"^\[`(\w+)`\]|(?<=\s)\[`(\w+)`\]", lambda found: f"`{found[1] or found[2]}`", text)


class TransformersDocstrings(griffe.Extension):
    """Rewrites the docstrings of classes before they are parsed."""

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called with every class that is read."""
        if cls.docstring is not None and ENTRY.search(cls.docstring.value + "\n"):
            cls.docstring.value = as_lists(cls.docstring.value + "\n")
