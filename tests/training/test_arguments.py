"""Arguments are described once, in the docstring, which is the command line's help, too."""

import inspect
import re
from dataclasses import dataclass, field, fields

from hf_msae.training import SAETrainingArguments
from hf_msae.training.arguments import help_from_docstring


@help_from_docstring
@dataclass
class Few:
    """A few arguments.

    Args:
        first_size: How large; see `second`, not `third`. 5% is
            usual.
        second: A flag: on or off.

    Raises:
        ValueError: Never.
    """

    first_size: int = 1
    second: bool = field(default=False, metadata={"aliases": ["-s"]})


def test_help_is_what_the_docstring_says():
    first, second = fields(Few)
    assert first.metadata["help"] == "How large; see --second, not `third`. 5%% is usual."
    assert second.metadata == {"aliases": ["-s"], "help": "A flag: on or off."}


def test_every_training_argument_is_described_and_nothing_else_is():
    names = [known.name for known in fields(SAETrainingArguments)]
    assert all(known.metadata["help"].endswith(".") for known in fields(SAETrainingArguments))
    section = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(SAETrainingArguments), re.DOTALL)[1]
    assert re.findall(r"^ {4}(\w+):", section, re.MULTILINE) == names
