"""`hf-msae serve`: an OpenAI-compatible server in which each request may steer."""

import logging
from dataclasses import dataclass, field

from hf_msae.cli.parser import build_parser, parse

DESCRIPTION = """\
Serve the language model of an SAE to clients of OpenAI's API (/v1/completions, /v1/chat/completions, /v1/models). A
request may steer, by latents or by the name of a steering that is saved beside the SAE, and may ask for the latents
that were active on each token."""


@dataclass
class ServeArguments:
    """What is served, and where."""

    _argument_group_name = "serve"
    _positional = ("saes",)

    saes: list[str] = field(
        metadata={"help": "Folders or Hub repos with SAEs; each is a model, called as its folder or repo."}
    )
    model: str | None = field(
        default=None, metadata={"help": "The language model. Default: the one that each SAE was trained on."}
    )
    subfolder: str = field(default="", metadata={"help": "The SAE's folder in a repo of several. Default: all."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 for other machines."})
    port: int = field(default=8000, metadata={"help": "Port; 0 takes a free one."})
    api_key: str | None = field(default=None, metadata={"help": "What clients must give. Default: anything."})
    max_running: int = field(default=4, metadata={"help": "Requests that are written at once."})
    max_waiting: int = field(default=64, metadata={"help": "Requests that may wait for these; more are refused."})
    max_tokens: int = field(default=1024, metadata={"help": "Tokens that a request may ask for."})


def run(arguments: list[str]) -> None:
    """Parse, load, serve until interrupted."""
    (args,) = parse(build_parser("serve", DESCRIPTION, (ServeArguments,)), arguments)

    from hf_msae.cli.sources import check_sae_place
    from hf_msae.serving import Limits, load_served, run_server
    from hf_msae.serving.models import LanguageModel

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    limits = Limits(max_running=args.max_running, max_waiting=args.max_waiting, max_tokens=args.max_tokens)
    for source in args.saes:
        check_sae_place(source)
    loaded: dict[tuple[str, str | None], LanguageModel] = {}
    served = [load_served(one, subfolder=args.subfolder, model=args.model, loaded=loaded) for one in args.saes]
    run_server(served, host=args.host, port=args.port, limits=limits, api_key=args.api_key)
