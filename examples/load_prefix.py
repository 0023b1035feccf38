"""Read only the first latents of an SAE, and see what each level keeps of a text.

python examples/load_prefix.py                    # the SAE of examples/train.py
python examples/load_prefix.py --sae me/gemma-l12-msae --prefix 2048    # from the Hub: the bytes of 2,048 rows
"""

import argparse

from hf_msae import MatryoshkaSAE, capture, resolve_site
from hf_msae.language_models import load_language_model, model_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", default="runs/example", help="a folder or a Hub repo")
parser.add_argument("--model", help="the language model; default: the one that the SAE was trained on")
parser.add_argument("--prefix", type=int, default=128, help="how many latents to read")
parser.add_argument("--text", default="Once upon a time, there was a little owl. It was very hungry and flew away.")
options = parser.parse_args()

whole = MatryoshkaSAE.from_pretrained(options.sae)
small = MatryoshkaSAE.from_pretrained(options.sae, prefix=options.prefix)
print(f"{small.config.num_latents:,} of {whole.config.num_latents:,} latents were read")

model, tokenizer = load_language_model(options.model or model_of(whole.config)[0] or "stories")
site = resolve_site(model, whole.config.site)
inputs = tokenizer(options.text, return_tensors="pt")
x = capture(model, [site], **inputs)[site][0, 1:].float()  # without BOS, which no SAE here was trained on

assert small.W_dec.equal(whole.W_dec[: options.prefix])  # the small model is the beginning of the whole
latents = whole.encode(x)
for prefix in whole.config.prefix_sizes:
    error = (x - whole.decode(latents, prefix=prefix)).square().sum()
    explained = 1 - error / (x - x.mean(0)).square().sum()
    active = (latents[:, :prefix] > 0).sum(-1).float().mean()
    print(f"the first {prefix:,}: {active:.1f} active a token, explain {explained:.1%} of this text's variance")
