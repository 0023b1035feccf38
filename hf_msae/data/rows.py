"""What a row holds: a text, a chat, or token ids; in the forms in which data sets on the Hub have them.

Chats are lists of messages, or JSON text of such a list; their tools stand in a column beside them, or in none. A
message may lack its content (a call of a tool has none) and has None under every key that any other message has,
because Arrow gives all of them the same keys.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from hf_msae.data.sources import DatasetError, UnreadableRow

Message = dict[str, Any]
CHAT_COLUMNS = ("messages", "conversations")
TOKEN_COLUMN = "input_ids"
TOOLS_COLUMN = "tools"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
EXPECTED = 'expected a string, a list of messages {"role": ..., "content": ...} or a list of token ids'


class Chat(list[Message]):
    """Messages, and the tools that the chat template is given with them."""

    def __init__(self, messages: Sequence[Message], tools: list[Any] | None = None) -> None:
        super().__init__(messages)
        self.tools = tools


class TokenIds(list[int]):
    """A document that was tokenized already."""


Document = str | Chat | TokenIds


def find_column(row: Mapping[str, Any], description: str, text_column: str, messages_column: str | None) -> str:
    """The column that holds the documents, by a first row. Raises `DatasetError` where there is none."""
    wanted = messages_column or text_column
    others = [] if messages_column else [name for name in (*CHAT_COLUMNS, TOKEN_COLUMN) if name in row]
    if wanted in row:
        if messages_column and isinstance(row[wanted], str) and _parsed(row[wanted]) is None:
            raise DatasetError(
                f"the column {wanted!r} of {description} holds text that is not a chat ({row[wanted][:40]!r}); give "
                "it as text_column, or a column with messages as messages_column"
            )
        return wanted
    if others:
        return others[0]
    texts = [name for name, value in row.items() if isinstance(value, str)]
    chats = [name for name, value in row.items() if _is_chat(value) or _parsed(value) is not None]
    raise DatasetError(
        f"{description} has no column {wanted!r}. Its columns: {', '.join(map(str, row))}. "
        f"With text (text_column=...): {', '.join(texts) or 'none'}. "
        f"With chats (messages_column=...): {', '.join(chats) or 'none'}."
    )


def to_document(row: Any, column: str | None, where: str, chats: bool) -> Document:
    """The document in a row.

    Args:
        row: a row with columns, or the document itself where `column` is None.
        column: the name of the column that holds the document.
        where: what to call it in an `UnreadableRow`, which is raised for what is no document.
        chats: whether text in this column is the JSON of a chat.
    """
    value: Any = row
    if column is not None:
        value = row.get(column) if isinstance(row, Mapping) else None
        where += f", column {column!r},"
    if isinstance(value, str):
        if not chats:
            return value
        value = _parsed(value)
        if value is None:
            raise UnreadableRow(f"{where} is text that is not the JSON of a chat")
    if isinstance(value, numpy.ndarray | torch.Tensor):
        value = value.tolist()
    if _is_chat(value):
        tools = row.get(TOOLS_COLUMN) if isinstance(row, Mapping) else None
        return Chat([_message(message) for message in value], _tools(tools, where))
    if isinstance(value, list | tuple) and all(type(token) is int for token in value) and (value or not chats):
        return TokenIds(value)
    found = "missing or null" if value is None else f"a {type(value).__name__}"
    raise UnreadableRow(f"{where} is {found}, {EXPECTED}")


def _parsed(text: Any) -> list[Any] | None:
    """The chat whose JSON a text is, if it is one."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if _is_chat(value) else None


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(m, Mapping) and ("role" in m or {"from", "value"} <= m.keys()) for m in value)


def _message(message: Mapping[str, Any]) -> Message:
    """A message as chat templates want it; the ShareGPT form has `from` and `value`."""
    if "role" in message:
        given = {key: value for key, value in message.items() if value is not None}
        return {"role": message["role"], "content": "", **given}
    sender = message["from"]
    return {"role": SHAREGPT_ROLES.get(sender, sender), "content": message["value"]}


def _tools(value: Any, where: str) -> list[Any] | None:
    """Tools as chat templates want them, from a list or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise UnreadableRow(f"{where} has tools that are text but not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UnreadableRow(f"{where} has tools that are no list of objects, but a {type(value).__name__}")
    return [_without_nulls(tool) for tool in value]


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow filled with None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
