"""`hf-msae neuronpedia`: an interpretation in the form that Neuronpedia imports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from hf_msae.formats.neuronpedia import NeuronpediaNames
    from hf_msae.interpret import Interpretation

DESCRIPTION = """\
Write the interpretation of SAE (a folder or a Hub repo, read by `hf-msae interpret` before) for Neuronpedia's
importer: features, contexts and labels, in DEST/<model>/<layer>-<source set>."""


@dataclass
class NeuronpediaArguments:
    """What is written, and what Neuronpedia shall call it."""

    _argument_group_name = "neuronpedia"
    _positional = ("sae", "dest")

    sae: str = field(metadata={"help": "A folder or a Hub repo with an SAE and its interpretation."})
    dest: str = field(metadata={"help": "Folder to write into."})
    source_set: str = field(metadata={"help": "The set that the SAE belongs to there, such as someone-res-16k."})
    creator: str = field(metadata={"help": "Who made it."})
    subfolder: str = field(default="", metadata={"help": "Folder of the SAE within SAE."})
    model_name: str | None = field(
        default=None, metadata={"help": "Neuronpedia's name of the language model. Default: TransformerLens' name."}
    )
    layer: int | None = field(default=None, metadata={"help": "The SAE's layer, where its site does not say."})
    release: str | None = field(
        default=None, metadata={"help": "Identifier of the publication. Default: the source set."}
    )
    release_title: str | None = field(default=None, metadata={"help": "Its title. Default: the identifier."})
    url: str = field(default="", metadata={"help": "Its address."})
    hf_repo: str | None = field(
        default=None, metadata={"help": "Hub repo of the weights. Default: SAE, if it is a repo."}
    )


def run(arguments: list[str]) -> None:
    """Parse, write, say where."""
    (args,) = parse(build_parser("neuronpedia", DESCRIPTION, (NeuronpediaArguments,)), arguments)

    from rich.console import Console

    from hf_msae.cli.sources import check_sae_place
    from hf_msae.formats.neuronpedia import write_neuronpedia
    from hf_msae.interpret import Interpretation

    check_sae_place(args.sae)
    interpretation = Interpretation.load(args.sae, subfolder=args.subfolder or None)
    place = write_neuronpedia(interpretation, _names(args, interpretation), args.dest)
    Console(highlight=False).print(f"Wrote {len(interpretation):,} latents to {place}", soft_wrap=True)


def _names(args: NeuronpediaArguments, interpretation: "Interpretation") -> "NeuronpediaNames":
    from hf_msae.formats.neuronpedia import NeuronpediaNames, layer_of
    from hf_msae.formats.saelens_names import model_in_lens

    base, site = interpretation.source.base_model, interpretation.source.site
    model = args.model_name or model_in_lens(base or "") or (base or "").rpartition("/")[2].lower()
    if not model:
        raise InputError("The interpretation does not record its language model; give --model-name.")
    layer = args.layer if args.layer is not None else layer_of(site)
    if layer is None:
        raise InputError(f"The site {site!r} does not say which layer it is in; give --layer.")
    release = args.release or args.source_set
    return NeuronpediaNames(
        model=model,
        layer=layer,
        source_set=args.source_set,
        creator=args.creator,
        release=release,
        release_title=args.release_title or release,
        url=args.url,
        hf_repo=args.hf_repo or (None if Path(args.sae).is_dir() else args.sae),
        hf_folder=args.subfolder or None,
    )
