"""What people wrote into a model card survives the next push.

A card's generated parts lie between HTML comments, each with a fingerprint of what was generated; a part is replaced
only while its text still has that fingerprint, and one that somebody removed stays away. All other text is theirs. The
same holds for each key of the metadata, whose fingerprints are in one comment below it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from hf_msae.errors import InputError

FRONT_MATTER = re.compile(
    r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
PART = re.compile(
    r"<!-- hf_msae:begin (?P<name>[\w-]+)(?: sha256=(?P<hash>\w+))? -->\r?\n"
    r"(?P<body>.*?)<!-- hf_msae:end (?P=name) -->",
    re.DOTALL,
)
RECORD = re.compile(r"<!-- hf_msae:metadata(?P<keys>(?: [\w-]+=\w+)*) -->")


class CardError(InputError):
    """A card whose metadata cannot be read."""


def fingerprint(text: str) -> str:
    """The beginning of the SHA-256 of a text; blanks at the ends of lines, which editors change, do not count."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _value_fingerprint(value: Any) -> str:
    return fingerprint(json.dumps(value, sort_keys=True, default=str))


def fingerprint_parts(metadata: Mapping[str, Any], body: str) -> str:
    """A new card: metadata, and a body whose generated parts and metadata get their fingerprints."""
    body = PART.sub(lambda part: _part(part["name"], part["body"]), body)
    return _join(dict(metadata), _record({key: _value_fingerprint(metadata[key]) for key in metadata}) + "\n" + body)


def _part(name: str, body: str) -> str:
    return f"<!-- hf_msae:begin {name} sha256={fingerprint(body)} -->\n{body}<!-- hf_msae:end {name} -->"


def _record(fingerprints: Mapping[str, str]) -> str:
    keys = "".join(f" {key}={value}" for key, value in fingerprints.items())
    return f"<!-- hf_msae:metadata{keys} -->"


def _join(metadata: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)}---\n{body}"


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """The metadata and the body of a card. Raises `CardError` where the metadata is no YAML mapping."""
    match = FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match["yaml"]) or {}
    except yaml.YAMLError as error:
        raise CardError(f"The metadata at the top of README.md is no valid YAML ({error}); mend it first.") from None
    if not isinstance(metadata, dict):
        raise CardError(f"The metadata at the top of README.md must be `key: value` lines, got {metadata!r}.")
    return metadata, card[match.end() :]


def has_marks(card: str) -> bool:
    """Whether anything in a card is ours."""
    return RECORD.search(card) is not None or PART.search(card) is not None


def merge_cards(existing: str, fresh: str) -> str:
    """The existing card with what nobody edited brought up to date from a fresh one, as `fingerprint_parts` gives it.

    A card without any mark of ours is somebody's own and stays as it is; one that has no text yet, as the Hub's
    website makes them, keeps its metadata and gets ours and the text. A `fresh` without metadata leaves the metadata
    alone.

    Raises `CardError` where the existing metadata cannot be read.
    """
    old_metadata, old_body = split_card(existing)
    new_metadata, new_body = split_card(fresh)
    head = existing[: len(existing) - len(old_body)]
    if not old_body.strip():
        return _merge_metadata(head, old_metadata, {}, new_metadata, new_body)
    if not has_marks(existing):
        return existing
    record = RECORD.search(old_body)
    parts = {part["name"]: part[0] for part in PART.finditer(new_body)}
    line_break = "\r\n" if "\r\n" in old_body else "\n"

    def updated(part: re.Match[str]) -> str:
        untouched = part["hash"] is not None and fingerprint(part["body"]) == part["hash"]
        return parts[part["name"]].replace("\n", line_break) if untouched and part["name"] in parts else part[0]

    body = PART.sub(updated, old_body)
    if not new_metadata:
        return head + body
    known = dict(pair.split("=") for pair in record["keys"].split()) if record else {}
    return _merge_metadata(head, old_metadata, known, new_metadata, body)


def _merge_metadata(head: str, old: dict[str, Any], known: dict[str, str], new: Mapping[str, Any], body: str) -> str:
    """Give the card with metadata changed only in keys whose old value is the one that we wrote (`known`).

    `head` is the text of the metadata as it is.
    """
    merged: dict[str, Any] = {}
    for key, value in old.items():
        ours = known.get(key) == _value_fingerprint(value)
        if not ours or key in new:
            merged[key] = new[key] if ours else value
    merged |= {key: value for key, value in new.items() if key not in old and key not in known}
    # What was removed, or changed, stays known as such.
    kept = {key: value for key, value in known.items() if key in new or key in merged}
    written = {key: _value_fingerprint(value) for key, value in merged.items() if key in new and new[key] == value}
    body = RECORD.sub(_record(kept | written), body, count=1)
    return head + body if merged == old else _join(merged, body)
