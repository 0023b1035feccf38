"""Train a Matryoshka SAE, on the story model that ships with the package or on a model of yours.

python examples/train.py                          # offline, some minutes on two cores
python examples/train.py --max-tokens 30000       # half a minute, to see that it runs
python examples/train.py --model gpt2 --dataset texts.jsonl --site layers.8 --max-tokens 20000000
"""

import argparse

from hf_msae import SAETrainer, SAETrainingArguments, load_documents
from hf_msae.language_models import load_language_model
from hf_msae.training import make_saes
from hf_msae.worlds.stories import StoryWorld

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stories", help="a Hub id or a folder")
parser.add_argument("--dataset", help="a file, a folder or a Hub id; default: stories")
parser.add_argument("--site", default="layers.2", help="where in the model")
parser.add_argument("--max-tokens", type=int, default=1_000_000, help="tokens to train on")
parser.add_argument("--output-dir", default="runs/example")
options = parser.parse_args()

model, tokenizer = load_language_model(options.model)
documents = load_documents(options.dataset) if options.dataset else StoryWorld().documents(10_000)

# Every combination of sites, sizes and k is trained from one pass of the model. Here there is one.
saes = make_saes(model, [options.site], num_latents=[1024], k=[8], prefix_sizes=[32, 128, 1024])
held_out = min(50_000, options.max_tokens // 5)
args = SAETrainingArguments(
    output_dir=options.output_dir,
    max_tokens=options.max_tokens,
    block_tokens=min(262_144, options.max_tokens),  # are read, and shuffled, before the first step
    per_device_train_batch_size=2048,
    eval_tokens=held_out,
    calibration_tokens=held_out,
    ce_tokens=held_out // 2,
    overwrite_output_dir=True,
)
measured = SAETrainer(model, saes, args, documents, processing_class=tokenizer).train()

for name, measurement in measured.items():
    for level in measurement.levels:
        print(f"{name}, first {level.prefix:,} latents: L0 {level.l0:.1f}, variance explained {level.fve:.3f}")
