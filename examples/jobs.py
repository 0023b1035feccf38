# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-msae"]
# ///
"""Train on Hugging Face Jobs. Checkpoints lie in a bucket, so the same command goes on where an ended job stopped.

python examples/jobs.py --output-dir runs/job                    # what a job does, on this machine
python examples/jobs.py --output-dir runs/job --model gpt2 --dataset Salesforce/wikitext

hf buckets create saes
hf jobs uv run --flavor a100-large --timeout 12h --secrets HF_TOKEN --volume hf://buckets/ME/saes:/runs \
    examples/jobs.py --model google/gemma-2-2b --dataset monology/pile-uncopyrighted --site layers.12 \
    --num-latents 65536 --k 40 --max-tokens 500M --output-dir /runs/gemma --push-to-hub --hub-model-id ME/gemma-sae

All flags are those of `hf-msae train`.
"""

import argparse
from pathlib import Path

from hf_msae.cli.main import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stories", help="a Hub id or a folder")
parser.add_argument("--dataset", help="a file, a folder or a Hub id; default: stories")
parser.add_argument("--output-dir", required=True, help="a folder in the bucket, where the next job finds it")
options, of_train = parser.parse_known_args()

arguments = ["train", "--model", options.model, "--output-dir", options.output_dir, *of_train]
if options.dataset is not None:
    arguments += ["--dataset", options.dataset]
if any(Path(options.output_dir).glob("checkpoint-*")) and "--resume-from-checkpoint" not in of_train:
    print(f"{options.output_dir} has checkpoints: the run goes on from the newest.", flush=True)
    arguments += ["--resume-from-checkpoint"]
main(arguments)
