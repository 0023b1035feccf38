"""What several commands are asked: the model and the data. Read before anything that takes time is imported."""

from dataclasses import dataclass, field
from typing import Literal

from hf_msae.cli import common_fields
from hf_msae.worlds import STORIES


@dataclass
class SourceArguments:
    """Where tokens come from and which model reads them."""

    _argument_group_name = "model and data"

    model: str = field(
        default=STORIES,
        metadata={"help": "The language model, or a PEFT adapter: a Hub id or a folder; 'stories' is in the package."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision in which the language model runs."}
    )
    quantization: Literal["none", "4bit", "8bit"] | None = common_fields.quantization()
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' splits a language model that is too large over all devices."}
    )
    trust_remote_code: bool = common_fields.trust_remote_code()
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A Hub dataset (streamed), a .txt, .jsonl or .parquet file or a folder of them, a dataset saved "
            "to disk, or an activation cache, here or on the Hub. Default: the story world with the story model."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    messages_column: str | None = field(
        default=None, metadata={"help": "Column with chats; they go through the tokenizer's chat template."}
    )
    separator: str | None = field(
        default=None,
        metadata={
            "help": "What separates documents in .txt files, such as '\\n' for a document a line. Default: "
            "<|endoftext|> if used, else blank lines."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Text to measure on. Default: documents of --dataset, held out by a hash of each."},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to measure on, of --eval-dataset or else of --dataset."}
    )
