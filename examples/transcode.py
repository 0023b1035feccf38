"""Train a Matryoshka transcoder of an MLP, put it in the MLP's place at every level, and write circuit-tracer's form.

python examples/transcode.py                          # offline, some minutes on two cores
python examples/transcode.py --max-tokens 30000       # half a minute, to see that it runs
python examples/transcode.py --model gpt2 --dataset texts.jsonl --mlp layers.8.mlp --max-tokens 20000000
"""

import argparse

from hf_msae import MatryoshkaSAE, SAETrainer, SAETrainingArguments, convert, load_documents
from hf_msae.language_models import load_language_model
from hf_msae.training import make_saes
from hf_msae.worlds.stories import StoryWorld

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stories", help="a Hub id or a folder")
parser.add_argument("--dataset", help="a file, a folder or a Hub id; default: stories")
parser.add_argument("--mlp", default="layers.2.mlp", help="what is to be replaced")
parser.add_argument("--max-tokens", type=int, default=1_000_000, help="tokens to train on")
parser.add_argument("--output-dir", default="runs/transcoder")
options = parser.parse_args()

model, tokenizer = load_language_model(options.model)
documents = load_documents(options.dataset) if options.dataset else StoryWorld().documents(10_000)

# It reads the MLP's input and reconstructs its output; `skip` adds a linear map of the input to every level.
sizes = {"num_latents": [1024], "k": [8], "prefix_sizes": [64, 256, 1024]}
saes = make_saes(model, [f"{options.mlp}:input"], sites_out=[options.mlp], skip=True, **sizes)
held_out = min(50_000, options.max_tokens // 5)
args = SAETrainingArguments(
    output_dir=options.output_dir,
    max_tokens=options.max_tokens,
    per_device_train_batch_size=2048,
    eval_tokens=held_out,
    calibration_tokens=held_out,
    ce_tokens=held_out // 2,
    overwrite_output_dir=True,
)
(measured,) = SAETrainer(model, saes, args, documents, processing_class=tokenizer).train().values()
for level in measured.levels:
    kept = (
        "" if level.ce_recovered is None else f", {level.ce_recovered:.1%} of the cross-entropy with the MLP replaced"
    )
    print(f"first {level.prefix:,} latents: {level.fve:.1%} of the MLP's output{kept}")

transcoder = MatryoshkaSAE.from_pretrained(options.output_dir)
print(f"reads {transcoder.config.site}, writes {transcoder.config.site_out}")
convert(options.output_dir, f"{options.output_dir}/circuit-tracer", to="circuit_tracer")
