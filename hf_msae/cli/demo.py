"""`hf-msae demo`: the Space on this machine, with the story model and a small SAE, trained at the first start."""

import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from hf_msae.cli.free_cores import on_free_cores
from hf_msae.cli.parser import build_parser, by_place, parse

DESCRIPTION = """\
Look inside an SAE of the story model in the browser, and steer with it. Needs no network. The first start trains the
SAE (about a minute) and keeps it in the cache; later ones open at once."""
# Part of the folder's name, so that another recipe is not mistaken for this one.
RECIPE = "stories-1024-k8-v1"
# As in `hf-msae quickstart`: sparse, and with a narrow first level, a latent more often stands for one concept.
PREFIX_SIZES, K, NUM_STORIES, MAX_TOKENS = (32, 128, 1024), 8, 9_000, 800_000


@dataclass
class DemoArguments:
    """What is shown."""

    _argument_group_name = "demo"
    _positional = ("sae",)

    sae: str | None = field(default=None, metadata={"help": "Show this SAE instead: a folder or a Hub repo."})
    also: list[str] = field(
        default_factory=list,
        metadata={"help": "Further SAEs to choose from, such as one of a real model: folders or Hub repos."},
    )
    port: int | None = field(default=None, metadata={"help": "The port. Default: the first free one from 7860."})


def run(arguments: list[str]) -> None:
    """Parse, train where there is nothing yet, serve."""
    (args,) = parse(build_parser("demo", DESCRIPTION, (DemoArguments,)), by_place("demo", arguments))

    from hf_msae.hub.spaces import check_gradio, check_saes, run_space

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    check_gradio()
    check_saes(args.also)  # before anything is trained
    if args.sae is not None:
        run_space([args.sae, *args.also], port=args.port)
        return
    run_space([str(story_sae()), *args.also], title="Matryoshka SAE: the story world", port=args.port)


def story_sae() -> Path:
    """The folder of the demo's SAE, trained now if it is not there. It appears when it is complete."""
    from hf_msae.hub import cache_folder

    folder = cache_folder() / "demo" / RECIPE
    if (folder / "config.json").is_file():
        return folder
    print(f"Training a small SAE for the demo, once. It is kept in {folder}", flush=True)
    started, draft = time.monotonic(), folder.with_name(f".{RECIPE}-{os.getpid()}")
    try:
        with on_free_cores():
            train_story_sae(draft)
        if folder.exists():
            shutil.rmtree(folder)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"Trained in {time.monotonic() - started:.0f} s.", flush=True)
    return folder


def train_story_sae(folder: Path, max_tokens: int = MAX_TOKENS) -> None:
    """Train the demo's SAE into a new folder."""
    from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
    from hf_msae.training import SAETrainer, SAETrainingArguments
    from hf_msae.worlds.stories import STORIES, StoryWorld, load_story_lm

    model, tokenizer = load_story_lm()
    model.config.name_or_path = STORIES  # what the SAE records as its model
    config = MatryoshkaSAEConfig(
        hidden_size=128, num_latents=PREFIX_SIZES[-1], prefix_sizes=PREFIX_SIZES, k=K, site="layers.2"
    )
    args = SAETrainingArguments(
        output_dir=str(folder),
        max_tokens=max_tokens,
        eval_tokens=50_000,
        calibration_tokens=50_000,
        ce_tokens=10_000,
        save_steps=0,
    )
    stories = StoryWorld(seed=0).documents(NUM_STORIES)
    SAETrainer(model, MatryoshkaSAE(config), args, stories, processing_class=tokenizer).train()
