"""Find a latent that promotes a word, turn it up, and write the same text without and with it.

python examples/steer.py                              # the SAE of examples/train.py, after examples/interpret.py
python examples/steer.py --sae runs/gpt2 --word river --prompt "I went to the" --strengths 0.5 1 2
"""

import argparse

from hf_msae import Interpretation, MatryoshkaSAE, SteeredPipeline, Steering
from hf_msae.interpret import search_promoting
from hf_msae.language_models import load_language_model, model_of
from hf_msae.steering import LatentEdit, save_steering

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", default="runs/example", help="a folder with an SAE and its interpretation")
parser.add_argument("--model", help="the language model; default: the one that the SAE was trained on")
parser.add_argument("--word", default="angry", help="what to steer towards")
parser.add_argument("--prompt", default="It was a cold day, and Ben was very")
parser.add_argument(
    "--strengths", type=float, nargs="+", default=[0.5, 1.0], help="in the latent's largest activation"
)
options = parser.parse_args()

sae = MatryoshkaSAE.from_pretrained(options.sae)
model, tokenizer = load_language_model(options.model or model_of(sae.config)[0] or "stories")

# By what a latent makes likelier, not by where it fires: most latents that fire on a word do not make a model say it.
hits = search_promoting(options.word, Interpretation.load(options.sae))
latent = hits[0].latent if hits else int(sae.firing_rate.argmax())
print(f"latent {latent}" + ("" if hits else f" (the most frequent: none promotes {options.word!r})"))

pipe = SteeredPipeline(model, tokenizer, sae, Steering())
print("unsteered:", pipe(options.prompt, max_new_tokens=30, seed=0)[0]["generated_text"])
for strength in options.strengths:
    steering = Steering([LatentEdit(latent, strength)], positions="prompt", name=f"{options.word}-{strength}")
    steered = pipe.with_steering(steering)(options.prompt, max_new_tokens=30, seed=0)[0]["generated_text"]
    print(f"{strength:g}:", steered)
    save_steering(steering, options.sae)  # beside the SAE, to be loaded by its name
