"""What one request may ask for, and how many may ask at once; and the error of a request that is refused."""

from dataclasses import dataclass, fields

from hf_msae.errors import InputError


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Args:
        max_running: Texts that are written at once, each in a thread.
        max_waiting: Requests that may wait for a thread; more are refused.
        max_tokens: Tokens that a request may ask for, of each text.
        max_texts: Texts that a request may ask for: prompts times `n`.
        max_edits: Edits of a steering.
        max_body: Bytes of a request.

    Raises:
        InputError: A limit is not a whole number from 1, or from 0 for `max_waiting`.
    """

    max_running: int = 4
    max_waiting: int = 64
    max_tokens: int = 1024
    max_texts: int = 16
    max_edits: int = 64
    max_body: int = 1 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = vars(self)[field.name], 0 if field.name == "max_waiting" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{field.name} must be a whole number from {least}, got {value!r}.")


class RequestError(InputError):
    """A request that is refused.

    Args:
        message: What was asked, what is expected and what to do.
        param: The part of the request that is meant.
        status: Of HTTP.
        code: A word for programs.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
