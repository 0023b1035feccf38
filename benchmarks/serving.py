"""How many tokens a second `hf-msae serve` writes for one client and for many, beside plain `generate`.

    python benchmarks/serving.py --sae runs/quickstart --clients 1 16 --json serving.json

Each client asks for one text after another and steers its own latent; plain `generate` is not steered and runs in this
process, one text at a time. All sample, with seeds.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import uvicorn
from openai import OpenAI

from hf_msae.serving import Limits, Served, build_app, load_served

PROMPT = "Once upon a time, there was a little"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True, help="folder or repo of an SAE")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--texts", type=int, default=4, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--running", type=int, default=4, help="texts that the server writes at once")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


def plain(served: Served, num_texts: int, new_tokens: int) -> float:
    """Tokens a second of `generate`."""
    inputs = served.tokenizer(PROMPT, return_tensors="pt").to(served.pipe.model.device)
    width = inputs.input_ids.shape[1]
    begun, written = time.perf_counter(), 0
    for _ in range(num_texts):
        written += served.pipe.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True).shape[1] - width
    return written / (time.perf_counter() - begun)


@contextmanager
def server(served: Served, running: int) -> Iterator[str]:
    """The address of a server in this process."""
    with create_server(("127.0.0.1", 0)) as listening:
        app = build_app([served], Limits(max_running=running, max_waiting=1000))
        started = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=started.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        started.should_exit = True
        thread.join()


def through_server(served: Served, url: str, clients: int, num_texts: int, new_tokens: int) -> float:
    """Tokens a second of all clients together, each with a latent of its own."""
    largest = next(iter(served.pipe.saes.values())).max_activation
    latents = largest.topk(clients).indices.tolist()

    def ask(number: int) -> int:
        written = 0
        with OpenAI(base_url=url, api_key="any", max_retries=0, timeout=3600) as client:
            for text in range(num_texts):
                answer = client.completions.create(
                    model=served.name,
                    prompt=PROMPT,
                    max_tokens=new_tokens,
                    seed=text,
                    extra_body={"steering": {"latents": {str(latents[number]): 1.0}}},
                )
                written += answer.usage.completion_tokens
        return written

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        written = sum(threads.map(ask, range(clients)))
    return written / (time.perf_counter() - begun)


def main() -> None:
    args = parse()
    served = load_served(args.sae)
    plain(served, 1, 4)
    rates = {"generate": plain(served, args.texts, args.new_tokens)}
    with server(served, args.running) as url:
        for clients in args.clients:
            rates[f"{clients} clients"] = through_server(served, url, clients, args.texts, args.new_tokens)
    for name, rate in rates.items():
        print(f"{name:>12}  {rate:8.1f} tokens/s")
    if args.json:
        Path(args.json).write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
