"""Decompositions to look through: what latents are made of, and which others share the parts.

One HTML file without anything from outside, for a meta-SAE and the SAE that it takes apart. A latent is known by the
tokens on which it is most active; a meta-latent by the latents that use it most.
"""

import json
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_msae.evaluation.activations import TextActivations
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.meta import decompose, unit_rows

LOOKED_AT = 24
WORDS = 4
USERS = 30


@torch.inference_mode()
def token_labels(text: TextActivations, tokenizer: PreTrainedTokenizerBase, sae: MatryoshkaSAE) -> list[str]:
    """For every latent the different tokens among its 24 strongest activations, up to four, the strongest first.

    Args:
        text: activations of the SAE's site.
        tokenizer: of the language model.
        sae: in evaluation mode.

    Returns:
        A label for each latent, empty for one that never fires in this text.
    """
    ids = text.token_ids
    values, places = torch.zeros(0, sae.config.num_latents), torch.zeros(0, sae.config.num_latents, dtype=torch.int64)
    start = 0
    for x in text.batches(sae):
        found = sae.encode(x).float().cpu()
        numbers = torch.arange(start, start + len(found))[:, None].expand_as(found)
        candidates, numbers = torch.cat([values, found]), torch.cat([places, numbers])
        values, order = candidates.topk(min(LOOKED_AT, len(candidates)), dim=0)
        places = numbers.gather(0, order)
        start += len(found)
    labels = []
    for strengths, where in zip(values.T, places.T, strict=True):
        tokens = dict.fromkeys(ids[where[strengths > 0]].tolist())
        words = [str(tokenizer.decode([token])).strip() for token in tokens]
        labels.append(" ".join([word for word in dict.fromkeys(words) if word][:WORDS]))
    return labels


def render_browser(
    meta: MatryoshkaSAE, sae: MatryoshkaSAE, facts: Mapping[str, Any], labels: Sequence[str] = ()
) -> str:
    """The page, an HTML document with everything in it.

    Args:
        meta: a meta-SAE.
        sae: the SAE that it takes apart.
        facts: what stands under the title, by name.
        labels: of the SAE's latents, or none.
    """
    rows, directions = unit_rows(sae)
    found = {item.latent: item for item in decompose(meta, sae, rows.tolist(), neighbours=0)}
    contents = {
        "labels": list(labels),
        "latents": {
            latent: [
                round(item.cosine, 3),
                [[part.meta_latent, round(part.activation, 3)] for part in item.parts],
            ]
            for latent, item in found.items()
        },
        "metas": _users(meta, rows, directions),
        "facts": dict(facts),
    }
    # A "</script>" in a token would end the script.
    return PAGE.substitute(data=json.dumps(contents, separators=(",", ":")).replace("<", "\\u003c"))


def _users(meta: MatryoshkaSAE, rows: Tensor, directions: Tensor) -> dict[int, list[list[float]]]:
    """For every meta-latent, how many latents use it, and the 30 that do so most, with their activations."""
    with torch.inference_mode():
        activations = meta.encode(directions.to(meta.device)).cpu()
    values, places = activations.topk(min(USERS, len(rows)), dim=0)
    counts = (activations > 0).sum(0).tolist()
    return {
        number: [
            [counts[number]],
            *([int(rows[place]), round(value, 3)] for value, place in zip(column, where, strict=True) if value > 0),
        ]
        for number, (column, where) in enumerate(zip(values.T.tolist(), places.T.tolist(), strict=True))
    }


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Decompositions of latents</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
input { font: inherit; padding: .4rem .6rem; width: 100%; box-sizing: border-box }
.facts, .small { color: #666 } .part { border-left: 3px solid #3f8fd6; margin: .7rem 0; padding: .1rem .8rem }
.bar { display: inline-block; height: .6rem; background: #3f8fd6; vertical-align: middle; margin-right: .4rem }
button { font: inherit; border: 1px solid #ccd; background: #f4f6fa; border-radius: .4rem; padding: .1rem .5rem;
  margin: .12rem; cursor: pointer; color: inherit }
button:hover, button:focus { background: #dde8f6 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } .facts, .small { color: #999 }
  button { background: #23272e; border-color: #3a404a } button:hover, button:focus { background: #2f3a4a }
  input { background: #1d2026; color: inherit; border: 1px solid #3a404a } }
</style></head><body>
<h1>What latents are made of</h1><p class="facts" id="facts"></p>
<label>A latent's number or a word: <input id="query" autofocus></label>
<div id="view" aria-live="polite"></div>
<script>
const data = $data;
const view = document.getElementById("view"), query = document.getElementById("query");
const element = (tag, text, kind) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const title = (latent) => "latent " + latent + (data.labels[latent] ? ": " + data.labels[latent] : "");
const link = (latent, value) => {
  const made = element("button", title(latent) + (value === undefined ? "" : " (" + value + ")"));
  made.onclick = () => { location.hash = latent };
  return made;
};
document.getElementById("facts").textContent =
  Object.entries(data.facts).map(([name, value]) => name + ": " + value).join(" · ");
function showLatent(latent) {
  const [cosine, parts] = data.latents[latent];
  view.replaceChildren(element("h2", title(latent)));
  view.append(element("p", parts.length + " meta-latents; cosine of their sum with the decoder row, less the bias: " +
    cosine));
  for (const [meta, activation] of parts) {
    const box = element("div", undefined, "part"), bar = element("span", undefined, "bar");
    bar.style.width = Math.min(12, 10 * activation) + "rem";
    const [count, ...users] = data.metas[meta];
    const head = element("div", "meta-latent " + meta + ", activation " + activation);
    head.prepend(bar);
    box.append(head, element("div", "used by " + count[0] + " latents, most by:", "small"));
    for (const [other, value] of users) if (other !== latent) box.append(link(other, value));
    view.append(box);
  }
}
function search(text) {
  const wanted = text.trim().toLowerCase();
  view.replaceChildren();
  let numbers = Object.keys(data.latents).map(Number);
  if (wanted) numbers = numbers.filter((n) => String(n) === wanted ||
    (data.labels[n] || "").toLowerCase().includes(wanted));
  view.append(element("p", numbers.length + " latents" + (numbers.length > 200 ? ", the first 200:" : ":")));
  for (const number of numbers.slice(0, 200)) view.append(link(number));
}
const follow = () => {
  const latent = Number(location.hash.slice(1));
  if (location.hash.length > 1 && latent in data.latents) showLatent(latent); else search(query.value);
};
query.oninput = () => { history.replaceState(null, "", location.pathname); search(query.value) };
window.onhashchange = follow;
follow();
</script></body></html>
""")
