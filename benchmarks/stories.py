"""The story world as a benchmark: an SAE and its baselines in one table, with the grammar's labels as truth.

    hf-msae eval runs/mine --baselines batch_topk pruned_topk frozen_decoder pca random --output-dir runs/evaluation
    python benchmarks/stories.py --sae runs/mine --evaluation runs/evaluation

Probing, absorption, splitting and erasure are read from the evaluation, whole dictionaries, mean ± standard deviation
over splits. Beside them stands what the evaluation does not measure: precision and recall of the edges between levels
against the concept tree, as in `hierarchy.py`. An SAE of one level has no edges.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from claims import CONTEXT_LENGTH, World, measure_edges

from hf_msae import MatryoshkaSAE
from hf_msae.cli.sources import STORY_DOCUMENTS
from hf_msae.data import as_documents
from hf_msae.evaluation import collect
from hf_msae.evaluation.baselines import build_pca, build_random, prune
from hf_msae.sites import resolve_site
from hf_msae.worlds.stories import StoryWorld, load_story_lm

COUNT = 10
COLUMNS = {
    "L0": ("l0", 1),
    "FVE": ("fve", 3),
    "probe k=1": ("probe", 3),
    "latents per concept": ("split_latents", 2),
    "main F1": ("main_f1", 2),
    "absorbed, full": ("full", 3),
    "absorbed, fraction": ("fraction", 3),
    "fires on children": ("child_recall", 2),
    "worst child": ("worst_child", 2),
    "elsewhere": ("elsewhere", 2),
    "TPP": ("tpp", 2),
    "SCR": ("scr", 2),
    "edges": ("edges", 0),
    "right": ("right_edges", 0),
    "edge precision": ("edge_precision", 2),
    "edge recall": ("edge_recall", 2),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True, help="folder of an SAE of the story model")
    parser.add_argument("--evaluation", required=True, help="what `hf-msae eval` wrote of it, with one baseline seed")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read(evaluation: dict[str, Any], name: str) -> dict[str, list[float]]:
    """A whole dictionary's numbers, one per split where there are several."""
    level = evaluation["core"][name]["measurement"]["levels"][-1]
    widest = level["prefix"]
    absorption = [item for item in evaluation["absorption"][name]["levels"] if item["prefix"] == widest]
    found = {column: [item[column] for item in absorption] for column in absorption[0]} if absorption else {}
    found |= {"l0": [level["l0"]], "fve": [level["fve"]]}
    wanted = (name, widest, 1)
    scores = evaluation["probing"]["scores"]
    found["probe"] = [s["accuracy"] for s in scores if (s["features"], s["prefix"], s["k"]) == wanted]
    for column, kind in (("tpp", "perturbation"), ("scr", "removal")):
        of = evaluation["erasure"][name][kind]
        found[column] = [s["score"] for s in of if (s["prefix"], s["count"]) == (widest, COUNT)]
    return found


def load(name: str, options: argparse.Namespace, sae: MatryoshkaSAE, x: torch.Tensor) -> MatryoshkaSAE:
    """The SAE behind a name of the evaluation, built anew where it was built."""
    if name == "random":
        return build_random(x, sae.config, 0)
    if name == "pca":
        rate = torch.cat([sae.encode(part) > 0 for part in x[:10_000].split(2048)]).double().mean(0)
        return build_pca(x, sae.config, [rate[:prefix].sum().item() for prefix in sae.config.prefix_sizes])
    folder = Path(options.evaluation) / "baselines" / "seed-0"
    if not (folder / name).is_dir():
        return sae
    trained = MatryoshkaSAE.from_pretrained(folder / name).eval()
    return prune(trained, x, sae.config.prefix_sizes) if name == "pruned_topk" else trained


def cell(values: list[float], digits: int) -> str:
    if not values or any(value is None or math.isnan(value) for value in values):
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


@torch.no_grad()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    evaluation = json.loads((Path(options.evaluation) / "evaluation.json").read_text(encoding="utf-8"))
    model, tokenizer = load_story_lm()
    sae = MatryoshkaSAE.from_pretrained(options.sae).eval()
    site = resolve_site(model, str(sae.config.site))
    documents = as_documents(StoryWorld(seed=0).documents(STORY_DOCUMENTS))
    length = sae.config.context_length or CONTEXT_LENGTH
    tokens = evaluation["facts"]["tokens"]
    x = collect(model, tokenizer, site, documents, num_tokens=tokens, context_length=length).x
    world = World("stories", model, tokenizer, documents, site)
    print("| SAE | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in evaluation["methods"]:
        found, subject = read(evaluation, name), load(name, options, sae, x)
        if subject.config.num_levels > 1:
            found |= {column: [value] for column, value in measure_edges(world, subject).items()}
        cells = [cell(found.get(column, []), digits) for column, digits in COLUMNS.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
