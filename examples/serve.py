"""Serve a language model and its SAE, and ask two users' questions at once, each with a steering of its own.

python examples/serve.py                              # the SAE of examples/train.py; needs 'hf-msae[serve]' and openai
python examples/serve.py --sae runs/gpt2 --latent 40 --strengths 0.5 2 --prompt "I went to the"
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import uvicorn
from openai import OpenAI

from hf_msae.serving import build_app, load_served

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sae", default="runs/example", help="a folder or a Hub repo")
parser.add_argument("--model", help="the language model; default: the SAE's own")
parser.add_argument("--latent", type=int, default=12)
parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0], help="a user each")
parser.add_argument("--prompt", default="Once upon a time")
options = parser.parse_args()

served = load_served(options.sae, model=options.model)
# `hf-msae serve` is this and no more; as an ASGI app it goes wherever FastAPI's do.
server = uvicorn.Server(uvicorn.Config(build_app([served]), port=0, log_level="warning"))
thread = Thread(target=server.run)
thread.start()
while not server.started:
    thread.join(0.1)
    if not thread.is_alive():
        raise SystemExit("The server did not start.")
client = OpenAI(base_url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", api_key="any")


def ask(strength: float) -> str:  # the continuation, and the latents that were strongest on its last token
    steering = {"latents": {str(options.latent): strength}} if strength else None
    more = {"return_latents": {"top": 3}, **({"steering": steering} if steering else {})}
    answer = client.completions.create(
        model=served.name, prompt=options.prompt, max_tokens=30, seed=0, extra_body=more
    )
    (choice,) = answer.choices
    active = ", ".join(str(one["latent"]) for one in choice.model_extra["latents"][-1]["latents"])
    return f"{strength:g}:{choice.text} (at its end: {active})"


with ThreadPoolExecutor() as users:
    print("\n".join(users.map(ask, [0.0, *options.strengths])))
server.should_exit = True
thread.join()
