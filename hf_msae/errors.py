"""Errors that a user can mend.

The command line prints them as one sentence and exits with 2. Any other exception is a fault of this package, and
keeps its traceback.
"""


class HfMsaeError(Exception):
    """Base of the errors that a user can mend: each says what was given, what was expected and what to do."""

    # With which a command ends that meets it.
    exit_code = 2


class InputError(HfMsaeError, ValueError):
    """An argument, a setting or a file cannot be used as it was given."""


class OutputExistsError(HfMsaeError, FileExistsError):
    """The place to write to is taken."""
