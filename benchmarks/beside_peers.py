"""One SAE on the same tokens, measured by hf_msae, by SAELens and by SAEBench's core evaluation.

    .venv-peers/bin/python benchmarks/beside_peers.py --sae runs/mine --model ../shared/data/stories260K \\
        --dataset ../shared/data/tinystories.txt

Needs SAELens and SAEBench (`make peers`). The language model is the Hugging Face one for all three, in SAELens'
`HookedProxyLM`, so nothing is fetched. SAELens reads the SAE from its own export (`hf-msae convert --to saelens`),
SAEBench takes `to_saebench`. docs/evaluation.md says where the differences come from.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_bench.evals.core import main as saebench_core
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE, ActivationsStore
from sae_lens import evals as saelens_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_msae import MatryoshkaSAE
from hf_msae.data import load_documents
from hf_msae.evaluation import collect
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.core import measure_core
from hf_msae.formats import saelens as saelens_format
from hf_msae.formats.saebench import to_saebench
from hf_msae.sites import resolve_site

# SAEBench's adapter asks for a model that TransformerLens knows; which it is has no part in the numbers.
NAMED_IN_LENS = "gpt2"
BATCH_WINDOWS = 16
ROWS = ("L0", "FVE", "cosine", "CE", "CE, reconstructed", "CE, zero", "CE recovered (zero)", "KL")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--windows", type=int, default=64, help="full windows, a multiple of 16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    return parser.parse_args()


def ours(text: TextActivations, sae: MatryoshkaSAE) -> dict[str, float]:
    measured = measure_core(text, {"": sae}, ce_tokens=text.num_tokens, rate_tokens=1_000)[""].measurement
    level = measured.levels[-1]
    assert level.cosine is not None
    assert level.kl is not None
    assert measured.ce_clean is not None
    assert measured.ce_zero is not None
    assert level.ce_increase is not None
    assert level.ce_recovered is not None
    ce = (measured.ce_clean, measured.ce_clean + level.ce_increase, measured.ce_zero, level.ce_recovered)
    return dict(zip(ROWS, (level.l0, level.fve, level.cosine, *ce, level.kl), strict=True))


def read(metrics: dict[str, Any]) -> dict[str, float]:
    """The same numbers by their names there, which SAELens and SAEBench share."""
    flat = {name: value for group in metrics.values() for name, value in group.items()}
    names = ("l0", "explained_variance", "cossim", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
    return dict(zip(ROWS, (flat[name] for name in (*names, "ce_loss_score", "kl_div_with_sae")), strict=True))


def store_of(model: HookedProxyLM, sae: Any, windows: list[list[int]]) -> ActivationsStore:
    """The windows as they are: each begins with BOS already, and has the whole context length."""
    dataset = Dataset.from_dict({"tokens": windows})
    return ActivationsStore.from_sae(
        model, sae, dataset=dataset, streaming=False, store_batch_size_prompts=BATCH_WINDOWS
    )


def hook_of(sae: MatryoshkaSAE) -> str:
    """A module's output goes by the module's name there."""
    return str(sae.config.site).removesuffix(":output")


EVERYTHING: dict[str, Any] = {
    "batch_size_prompts": BATCH_WINDOWS,
    "compute_kl": True,
    "compute_ce_loss": True,
    "compute_l2_norms": True,
    "compute_sparsity_metrics": True,
    "compute_variance_metrics": True,
}


def by_saelens(model: HookedProxyLM, sae: MatryoshkaSAE, windows: list[list[int]]) -> dict[str, float]:
    batches = len(windows) // BATCH_WINDOWS
    sizes = {"n_eval_reconstruction_batches": batches, "n_eval_sparsity_variance_batches": batches}
    with tempfile.TemporaryDirectory() as folder:
        saelens_format.write(sae, folder)
        theirs = SAE.load_from_disk(folder)
    theirs.cfg.metadata.hook_name = hook_of(sae)
    store = store_of(model, theirs, windows)
    config = saelens_evals.EvalConfig(**EVERYTHING, **sizes)
    return read(saelens_evals.run_evals(theirs, store, model, ActivationScaler(), config)[0])


def by_saebench(
    model: HookedProxyLM, sae: MatryoshkaSAE, windows: list[list[int]], unreplaced: bool
) -> dict[str, float]:
    """unreplaced: whether special tokens keep their activations and are left out, SAEBench's option for it."""
    batches = len(windows) // BATCH_WINDOWS
    bench = to_saebench(sae)
    bench.cfg.hook_name = hook_of(sae)
    load_and_format_sae("release", bench, "cpu")
    store = store_of(model, bench, windows)
    config = saebench_core.CoreEvalConfig(
        model_name=NAMED_IN_LENS,
        **EVERYTHING,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_featurewise_density_statistics=True,
        exclude_special_tokens_from_reconstruction=unreplaced,
    )
    tokenizer = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} if unreplaced else set()
    special = {token for token in ignored if token is not None}
    return read(saebench_core.run_evals(bench, store, model, config, ignore_tokens=special)[0])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    lm = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sae = MatryoshkaSAE.from_pretrained(options.sae).eval().requires_grad_(False)
    sae.config.base_model = NAMED_IN_LENS
    length = sae.config.context_length
    assert length is not None
    site = resolve_site(lm, str(sae.config.site))
    documents = load_documents(options.dataset)
    text = collect(lm, tokenizer, site, documents, num_tokens=options.windows * length, context_length=length)
    text.windows = [window for window in text.windows if len(window.input_ids) == length][: options.windows]
    text.x = text.x[: sum(int(window.keep.sum()) for window in text.windows)]
    windows = [window.input_ids.tolist() for window in text.windows]
    wrapped = HookedProxyLM(lm, tokenizer)
    found = {
        "hf_msae": ours(text, sae),
        "SAELens": by_saelens(wrapped, sae, windows),
        "SAEBench": by_saebench(wrapped, sae, windows, unreplaced=False),
        "SAEBench, special tokens excluded": by_saebench(wrapped, sae, windows, unreplaced=True),
    }
    print(f"{len(windows)} windows of {length} tokens, {text.num_tokens:,} of them not special\n")
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for row in ROWS:
        print(f"| {row} | " + " | ".join(f"{numbers[row]:.4f}" for numbers in found.values()) + " |")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
