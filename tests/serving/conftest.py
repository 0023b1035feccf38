"""A real server on this machine, in a thread, and OpenAI's own client."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import uvicorn
from openai import OpenAI
from patience import A_MOMENT, HANG_SECONDS, until
from transformers import LlamaForCausalLM
from warm_processes import free_port

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.serving import Limits, Served, build_app
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import LatentEdit, SteeredPipeline, Steering
from hf_msae.worlds.stories import load_story_lm

OWLS = Steering([LatentEdit(5, 3.0), LatentEdit(9, -2.0)], name="owls")


@dataclass
class Running:
    """A server that answers, and a client of it that asks once."""

    app: Any
    url: str
    client: OpenAI


@contextmanager
def run(served: list[Served], limits: Limits | None = None, api_key: str | None = None) -> Iterator[Running]:
    app, port = build_app(served, limits, api_key=api_key), free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=int(A_MOMENT))
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{port}/v1"
    with OpenAI(base_url=url, api_key=api_key or "any", max_retries=0, timeout=HANG_SECONDS) as client:
        try:
            yield Running(app, url, client)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[Running]]:
    """Starts a server, which ends with the context."""
    return run


@pytest.fixture(scope="session")
def stories() -> Served:
    """The story model with an untrained SAE of it whose maxima are measured, and a saved steering."""
    model, tokenizer = load_story_lm()
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=64, k=4, site="layers.2", base_model="stories")
    sae = MatryoshkaSAE(config).eval()
    site = resolve_site(model, "layers.2")
    x = capture(model, [site], **tokenizer("Once upon a time, there was a little owl.", return_tensors="pt"))[site]
    sae.calibrate_threshold([x[0, 1:]])
    sae.max_activation.copy_(sae.encode(x[0, 1:]).amax(0).clamp_min(5.0))
    return Served("stories", SteeredPipeline(model, tokenizer, sae, Steering()), {"owls": OWLS})


@pytest.fixture(scope="session")
def chats(lm: LlamaForCausalLM, build_tokenizer: Callable[..., Any]) -> Served:
    """A random model whose tokenizer has a chat template, with two SAEs."""
    saes = {}
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, k=4, site="layers.0")
        saes[name] = MatryoshkaSAE(config).eval()
        saes[name].max_activation.fill_(2.0)
    return Served("chats", SteeredPipeline(lm, build_tokenizer(), saes, Steering()))


@pytest.fixture(scope="session")
def server(stories: Served, chats: Served) -> Iterator[Running]:
    """Both models, two texts at a time."""
    with run([stories, chats], Limits(max_running=2, max_tokens=100)) as found:
        yield found
