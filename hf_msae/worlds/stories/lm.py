"""The small language model of the story world: a Llama trained on its stories by `scripts/train_story_lm.py`.

It ships with the package, so that everything can be tried offline on a model whose concepts are known.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.process_wide import loading


def story_lm_path() -> Path:
    """The folder of the shipped model and tokenizer, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "story-lm"


def load_story_lm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model (float32, in evaluation mode) and its tokenizer. Needs no internet.

    The tokenizer puts `<s>` in front of a text, writes every word of the stories as one token, all other text as
    bytes.
    """
    path = story_lm_path()
    with loading:
        return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
