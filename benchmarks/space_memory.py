"""Whether the Space's memory is bounded: resident memory while one visitor after another opens another SAE.

    python benchmarks/space_memory.py --saes 15 --json memory.json

Random SAEs of the story model, each opened as the page does it, looked at and left. Once with room for a few of them,
and once with room for all, which is what a Space without bounds does. Each has a process of its own.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from train_step import resident

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub.spaces import space_folder
from hf_msae.worlds.stories import story_lm_path

MB = 1e6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=15)
    parser.add_argument("--num-latents", type=int, default=65_536)
    parser.add_argument("--room", type=int, default=3, help="how many SAEs the budget has room for")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_saes(folder: Path, options: argparse.Namespace) -> None:
    """SAEs of the story model under another name, so that nothing is learnt of their latents in the background."""
    (folder / "lm").symlink_to(story_lm_path())
    for number in range(options.saes):
        shape = {"hidden_size": 128, "num_latents": options.num_latents, "prefix_sizes": [options.num_latents], "k": 8}
        config = MatryoshkaSAEConfig(**shape, site="layers.2", base_model=str(folder / "lm"))
        MatryoshkaSAE(config).save_pretrained(folder / f"sae-{number}")


def open_all(options: argparse.Namespace) -> list[float]:
    """Resident memory in MB, before anything is opened and after each SAE."""
    sys.path.insert(0, str(space_folder()))
    from msae_space.latent_index import LatentIndex
    from msae_space.library import Library
    from msae_space.loaded_sae import Key
    from msae_space.reading import read

    sources = tuple(str(options.folder / f"sae-{number}") for number in range(options.saes))
    library = Library(sources, budget=options.budget)
    found = [resident("VmRSS") / MB]
    for source in sources:
        loaded = library.open(Key(source))
        library.companion(loaded, LatentIndex).wait()
        read(loaded, "One day, a little girl went to the garden.")
        del loaded
        gc.collect()
        found.append(resident("VmRSS") / MB)
    return found


def main() -> None:
    options = parse()
    if options.folder is not None:
        print(json.dumps(open_all(options)))
        return
    # What the Space counts for an SAE: its weights, and what Python takes for what is known of its latents.
    size = (2 * 4 * 128 + 2048) * options.num_latents
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_saes(Path(folder), options)
        for name, room in (("bounded", options.room), ("unbounded", 2 * options.saes)):
            arguments = [*sys.argv, "--folder", folder, "--budget", str(int(room * size))]
            ran = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
            results[name] = json.loads(ran.stdout.splitlines()[-1])
            print(f"{name:10}", " ".join(f"{number:6.0f}" for number in results[name]), "MB", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
