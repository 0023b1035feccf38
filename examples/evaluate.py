"""Measure an SAE at every level, beside baselines that can make it look bad, and write the report.

python examples/evaluate.py                                            # the SAE of examples/train.py
python examples/evaluate.py --eval-tokens 5000 --metrics core          # seconds
python examples/evaluate.py --sae runs/gpt2 --dataset texts.jsonl --baselines batch_topk random
"""

import argparse

from hf_msae import EvaluationArguments, load_documents, run_evaluation
from hf_msae.evaluation import load_subjects
from hf_msae.evaluation.tables import all_tables
from hf_msae.language_models import load_language_model, model_of
from hf_msae.worlds.stories import StoryWorld

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", default="runs/example", help="a folder or a Hub repo")
parser.add_argument("--model", help="the language model; default: the one that the SAE was trained on")
parser.add_argument("--dataset", help="a file, a folder or a Hub id; default: stories")
parser.add_argument("--metrics", nargs="+", default=["core", "geometry", "absorption"])
parser.add_argument("--baselines", nargs="+", default=["pca", "random"])
parser.add_argument("--eval-tokens", type=int, default=50_000, help="tokens to measure on")
parser.add_argument("--output-dir", default="runs/example/evaluation", help="where JSON and report go")
options = parser.parse_args()

subjects = load_subjects([options.sae])  # more than one: seeds of a recipe, or rivals
model, tokenizer = load_language_model(options.model or model_of(subjects[0].sae.config)[0] or "stories")
documents = load_documents(options.dataset) if options.dataset else StoryWorld().documents(10_000)
args = EvaluationArguments(
    metrics=options.metrics,
    baselines=options.baselines,
    eval_tokens=options.eval_tokens,
    ce_tokens=options.eval_tokens // 4,
    rate_tokens=options.eval_tokens // 4,
    output_dir=options.output_dir,
    overwrite_output_dir=True,
)
evaluation = run_evaluation(subjects, model, tokenizer, documents, args)

for table in all_tables(evaluation):
    print(f"\n{table.title}\n{' | '.join(table.header)}")
    for row in table.rows:
        print(" | ".join(row))
print(f"\nopen {options.output_dir}/report.html")
