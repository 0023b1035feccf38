"""`hf-msae cache-activations`: a language model's activations on disk, to train on many times."""

import logging
import shlex
from dataclasses import dataclass, field

from hf_msae import reading_fields
from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.worlds import STORIES

# What `make_activation_cache` is told otherwise, or not at all.
NOT_OPTIONS = ("site", "output_dir", "use_cpu", "push_to_hub", "hub_private")

DESCRIPTION = """\
Write activations to disk once, shuffled, and train from them with `hf-msae train --dataset DIR --model ...`. A token
of a site of width d takes 2d bytes in bfloat16, 4d in float32. An interrupted cache goes on with the same command.
With --push-to-hub it is published, and `hf-msae train --dataset OWNER/NAME` streams it from there."""


@dataclass
class CacheArguments:
    """What is written, and how."""

    _argument_group_name = "cache"

    output_dir: str = field(metadata={"help": "The folder to make."})
    site: list[str] = field(metadata={"help": "One or more sites, such as layers.12."})
    max_tokens: int = field(metadata={"help": "How many tokens to write."})
    context_length: int = field(default=512, metadata={"help": "Tokens per window."})
    packing: bool = reading_fields.packing()
    shard_tokens: int = field(default=131_072, metadata={"help": "Tokens per file."})
    block_tokens: int = field(default=262_144, metadata={"help": "Tokens shuffled together."})
    lm_batch_size: int = reading_fields.lm_batch_size()
    batch_size: int = field(default=4096, metadata={"help": "Rows written at once."})
    norm_outlier_multiple: float | None = reading_fields.norm_outlier_multiple("Drop")
    eval_tokens: int = field(
        default=100_000,
        metadata={"help": "Leave out the documents on which `train` and `eval` measure with so many tokens."},
    )
    calibration_tokens: int = field(
        default=50_000, metadata={"help": "Leave out as many tokens with which `train` sets thresholds."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Publish it as this data set of the Hub, OWNER/NAME."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make a new data set on the Hub private."})
    use_cpu: bool = common_fields.use_cpu()
    seed: int = field(default=0, metadata={"help": "Fixes the order."})


def run(arguments: list[str]) -> None:
    """Parse, write, say where."""
    parser = build_parser("cache-activations", DESCRIPTION, (SourceArguments, CacheArguments))
    sources, args = parse(parser, arguments)

    from hf_msae.cli.sources import choose_device, load_language_model, load_text
    from hf_msae.data import CacheError, is_activation_cache, make_activation_cache
    from hf_msae.hub.data_sets import prepare_data_repo
    from hf_msae.shared_caches import push_activation_cache

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    repo = args.push_to_hub
    if repo is not None and is_activation_cache(args.output_dir):
        raise CacheError(
            f"{args.output_dir} holds a cache already; `hf-msae push {args.output_dir} {repo}` publishes it, or "
            "choose another folder for a new one."
        )
    documents, _ = load_text(sources)
    if repo is not None:
        repo = prepare_data_repo(repo, private=args.hub_private or None)
    model, tokenizer = load_language_model(sources)
    options = {name: value for name, value in vars(args).items() if name not in NOT_OPTIONS}
    cache = make_activation_cache(model, tokenizer, args.site, documents, args.output_dir, **options)
    outliers = cache.index["num_outliers"]
    left_out = f" ({outliers:,} outliers were left out)" if outliers else ""
    print(f"Wrote {cache.num_available:,} tokens to {cache.directory}{left_out}.")
    if repo is not None:
        print(f"Pushed: {push_activation_cache(cache.directory, repo)}")
    model_flag = "" if sources.model == STORIES else f" --model {shlex.quote(sources.model)}"
    print(f"Train on them with: hf-msae train --dataset {repo or shlex.quote(str(cache.directory))}{model_flag}")
