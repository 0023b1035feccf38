"""Make a page for every latent, look a word up, and walk the tree between levels.

python examples/interpret.py                          # the SAE of examples/train.py
python examples/interpret.py --max-tokens 20000       # seconds, and thin pages
python examples/interpret.py --sae runs/gpt2 --dataset texts.jsonl --word river
"""

import argparse
from pathlib import Path

from hf_msae import Interpretation, MatryoshkaSAE, interpret, load_documents
from hf_msae.interpret import read_hierarchy, search_promoting
from hf_msae.language_models import load_language_model, model_of
from hf_msae.worlds.stories import StoryWorld

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", type=Path, default=Path("runs/example"), help="a folder with an SAE")
parser.add_argument("--model", help="the language model; default: the one that the SAE was trained on")
parser.add_argument("--dataset", help="a file, a folder or a Hub id; default: stories")
parser.add_argument("--max-tokens", type=int, default=150_000, help="tokens to read")
parser.add_argument("--word", default="angry", help="which latents make it likelier?")
options = parser.parse_args()

if not (options.sae / "interpretation").is_dir():
    sae = MatryoshkaSAE.from_pretrained(options.sae)
    model, tokenizer = load_language_model(options.model or model_of(sae.config)[0] or "stories")
    documents = load_documents(options.dataset) if options.dataset else StoryWorld().documents(10_000)
    interpret(model, tokenizer, sae, documents, options.sae / "interpretation", max_tokens=options.max_tokens)
pages = Interpretation.load(options.sae)

for hit in search_promoting(options.word, pages)[:3]:
    page = pages.page(hit.latent)
    print(f"latent {page.latent} promotes {options.word!r}; it fires on {page.name}, such as:")
    print(*(f"    {context.marked_active()}" for context in page.top[:2]), sep="\n")

found = read_hierarchy(options.sae)
if found is not None:
    hierarchy, names = found
    for root in hierarchy.roots(names)[:3]:
        children = [names[edge.child] for edge in hierarchy.children(root)[:4]]
        print(f"below {root} ({names[root]}): {'; '.join(children)}")
