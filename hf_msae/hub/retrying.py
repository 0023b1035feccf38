"""Asking the Hub again after errors that pass by themselves; what does not pass is told in a sentence."""

import logging
import time
from collections.abc import Callable

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.errors import RevisionNotFoundError as NoRevisionError

from hf_msae.errors import InputError
from hf_msae.hub.card_parts import CardError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
# As long as huggingface_hub itself waits between its own attempts.
MAX_WAIT_S = 8
PASSING = (408, 429, 500, 502, 503, 504)
CONFLICTS = (409, 412)


class PublishError(InputError):
    """A push that the Hub, or what is to be pushed, does not allow."""


def with_retries(api: HfApi, repo_id: str, revision: str | None, attempt: Callable[[], str]) -> str:
    """Give the result of `attempt`, made again after errors that pass by themselves; others become a sentence.

    Args:
        api: Whose address errors name.
        repo_id: The repo, as the user wrote it.
        revision: The branch that was asked for.
        attempt: Pushes, and gives what it made.

    Raises:
        PublishError: For what does not pass, or not within some attempts.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except HFValidationError as error:
            raise PublishError(f"{repo_id!r} is not the id of a Hub repo (owner/name): {error}") from error
        except CardError as error:
            raise PublishError(f"{repo_id}: {error}") from error
        except (HTTPError, RuntimeError) as failure:
            cause = _http_error(failure)
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            passing = status is None or status in (*PASSING, *CONFLICTS)
            if not passing or number == ATTEMPTS - 1:
                raise PublishError(_in_words(cause, status, repo_id, revision, api.endpoint)) from failure
            _wait(0 if status in CONFLICTS else min(2**number, MAX_WAIT_S), repo_id, cause)
    raise AssertionError("the last attempt returns or raises")


def read_with_retries(repo_id: str, attempt: Callable[[], str]) -> str:
    """Give the result of `attempt`, made again after errors that pass by themselves; the last one is raised as it is.

    Args:
        repo_id: The repo.
        attempt: Downloads, and gives where it lies.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except (HTTPError, LocalEntryNotFoundError) as failure:
            # huggingface_hub says that a file is not here where it could not ask for it, and why is the cause.
            cause = failure.__cause__ if isinstance(failure, LocalEntryNotFoundError) else failure
            passing = isinstance(cause, HTTPError) and (
                not isinstance(cause, HfHubHTTPError) or cause.response.status_code in PASSING
            )
            if not passing or number == ATTEMPTS - 1:
                raise
            _wait(min(2**number, MAX_WAIT_S), repo_id, failure)
    raise AssertionError("the last attempt returns or raises")


def _wait(seconds: int, repo_id: str, error: Exception) -> None:
    logger.warning("%s: %s. Trying again in %d s.", repo_id, _last_line(error), seconds)
    time.sleep(seconds)


def writing_api(token: str | bool | None) -> HfApi:
    """The Hub's client with a token, which is asked for before anything is read or sent.

    Args:
        token: One that may write; None for the one that is logged in.

    Raises:
        PublishError: There is none.
    """
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise PublishError(
            "A push needs a token that may write: run `hf auth login`, set HF_TOKEN, or give token=. Tokens are made "
            "at https://huggingface.co/settings/tokens."
        )
    return HfApi(token=token, library_name="hf_msae")


def check_may_write(api: HfApi, repo_id: str) -> None:
    """Check a token's role and the repo's owner: of a repo that is there, the Hub tells neither before a push.

    Args:
        api: With the token.
        repo_id: Its whole id, owner/name.

    Raises:
        PublishError: The token may not write there.
    """
    account = api.whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    owners = {account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))}
    if role == "read" or repo_id.split("/")[0] not in owners:
        raise PublishError(may_not_write(repo_id, f"It is {account['name']}'s, with the role {role!r}."))


def may_not_write(repo_id: str, why: str) -> str:
    """The sentence about a token that may not.

    Args:
        repo_id: The repo.
        why: What tells so.
    """
    return (
        f"The token may not write to {repo_id}. Make one with the role `write` at "
        f"https://huggingface.co/settings/tokens, push under your own name, or give create_pr=True. {why}"
    )


def _http_error(error: Exception) -> HTTPError:
    """What went wrong with the Hub; of a large file that was not uploaded, huggingface_hub tells it as the cause."""
    cause = error if isinstance(error, HTTPError) else error.__cause__
    if not isinstance(cause, HTTPError):
        raise error
    return cause


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _in_words(error: Exception, status: int | None, repo_id: str, revision: str | None, endpoint: str) -> str:
    if status == 401:
        return (
            f"The Hub does not take this token, or it does not see {repo_id}: log in again (`hf auth login`), or give "
            f"another token. ({_last_line(error)})"
        )
    if status == 403:
        return may_not_write(repo_id, f"({_last_line(error)})")
    if isinstance(error, NoRevisionError):
        return f"{repo_id} has no revision {revision!r}."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repo {repo_id} that this token sees. ({_last_line(error)})"
    if status is None or status in PASSING:
        return (
            f"The push to {repo_id} did not get through to {endpoint} in {ATTEMPTS} attempts: {_last_line(error)}. A "
            "commit is whole or absent; push again, and what was uploaded already is not sent twice."
        )
    if status in CONFLICTS:
        return f"Others kept committing to {repo_id} during {ATTEMPTS} attempts; push again. ({_last_line(error)})"
    return f"The Hub refused the push to {repo_id}: {error}"
