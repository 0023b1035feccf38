"""What the pages of the documentation find around them, and how they and the examples are executed.

Python of the pages may use an SAE that lies in `runs/quickstart`, with an interpretation, and the names of `NAMES`, as
a reader has them who came from the page before.
"""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_msae.cli.main import main

# Far less than `hf-msae quickstart` trains, of the same form.
TRAIN = [
    *("train", "--num-latents", "1024", "--prefix-sizes", "32", "128", "1024", "--k", "8", "--batch-size", "1024"),
    *("--max-tokens", "30k", "--eval-tokens", "5k", "--calibration-tokens", "5k", "--ce-tokens", "2k"),
    *("--block-tokens", "30k", "--output-dir", "runs/quickstart", "--disable-tqdm"),
]
NAMES = """
from hf_msae import MatryoshkaSAE, resolve_site
from hf_msae.worlds.stories import StoryWorld, load_story_lm
model, tokenizer = load_story_lm()
sae = MatryoshkaSAE.from_pretrained("runs/quickstart")
site = resolve_site(model, sae.config.site)
documents = StoryWorld(seed=3).documents(200)
inputs = tokenizer("Once upon a time, there was a little owl.", return_tensors="pt")
"""


@contextmanager
def ended_well() -> Iterator[None]:
    """Go on after a program that ends by leaving Python; SystemExit where it failed."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def command(arguments: list[str]) -> None:
    """`hf-msae ...` in this process."""
    with ended_well():
        main(arguments)


def make_folder(folder: Path) -> None:
    """Train the SAE of the pages and read what its latents mean."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        command(TRAIN)
        command(["interpret", "runs/quickstart", "--max-tokens", "20k"])
    finally:
        os.chdir(before)


def run_page(folder: str, page: str, blocks: list[list[Any]], known: str = NAMES) -> None:
    """Execute blocks, all as one program that begins with what is known; tracebacks name the lines of the page."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.modules["__main__"].__dict__.update(names)
    exec(compile(known, "documents.NAMES", "exec"), names)
    for language, line, code in blocks:
        if language == "python":
            exec(compile("\n" * (line - 1) + code, page, "exec"), names)
        else:
            for program, *arguments in code:
                assert program == "hf-msae", f"{page}:{line}: only hf-msae runs, not {program}"
                print(f"$ hf-msae {' '.join(arguments)}")
                command(arguments)


def run_examples(folder: str, commands: list[list[str]]) -> None:
    """Execute scripts with arguments, one after another in one process, each as `python SCRIPT ARGUMENTS` would be."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for script, *arguments in commands:
        print(f"$ {Path(script).name} {' '.join(arguments)}", flush=True)
        sys.argv = [script, *arguments]
        with ended_well():
            runpy.run_path(script, run_name="__main__")


def run_notebook(folder: str, notebook: str, changes: dict[str, str]) -> None:
    """Execute the code of a notebook, as one program, with some of its text changed."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, notebook, "exec"), {"__name__": "__main__"})
