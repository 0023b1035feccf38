"""OpenAI's client is answered as the steered pipeline answers, whoever else asks meanwhile."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from openai import APIStatusError
from patience import HANG_SECONDS, until

from hf_msae.errors import InputError
from hf_msae.serving import Limits, build_app
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import LatentEdit, PrefixEdit, Steering

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time, there was a little"


def alone(served, steering: Steering, prompt: str = PROMPT, **options: Any) -> str:
    """What the steered pipeline writes behind the prompt."""
    pipe = served.pipe.with_steering(steering)
    return pipe(prompt, return_full_text=False, top_k=None, **options)[0]["generated_text"]


def complete(server, prompt: Any = PROMPT, model: str = "stories", **options: Any) -> Any:
    return server.client.completions.create(model=model, prompt=prompt, **options)


def test_sixteen_clients_at_once_each_get_their_own_steering(server, stories):
    asked = [{"latents": {str(latent): 4.0}} for latent in range(10)]
    asked += [None, "owls", {"level": 0}, {"latents": {"5": "ablate", "7": 3.0}}]
    asked += [{"latents": {"5": 2.0}, "method": "clamp"}, {"latents": {"5": 4.0}, "positions": "generated"}]
    steerings = [Steering([LatentEdit(latent, 4.0)]) for latent in range(10)]
    steerings += [Steering(), stories.steerings["owls"], Steering([PrefixEdit(0)])]
    steerings += [Steering([LatentEdit(5, method="ablate"), LatentEdit(7, 3.0)])]
    steerings += [Steering([LatentEdit(5, 2.0, "clamp")]), Steering([LatentEdit(5, 4.0)], "generated")]
    assert len(asked) == len(steerings) == 16
    together = threading.Barrier(16)

    def ask(index: int) -> str:
        together.wait()
        extra = {} if asked[index] is None else {"steering": asked[index]}
        options = {"max_tokens": 12, "temperature": 1.0, "seed": index, "extra_body": extra}
        if index % 2:
            return complete(server, **options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in complete(server, stream=True, **options))

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(16)))
    expected = [
        alone(stories, steering, seed=index, temperature=1.0, max_new_tokens=12)
        for index, steering in enumerate(steerings)
    ]
    assert found == expected
    assert len(set(found)) > 12


def test_an_answer_says_what_openais_says(server, stories):
    answer = complete(server, max_tokens=5, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == "stories"
    assert answer.choices[0].finish_reason == "length"
    num_prompt = len(stories.tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 5)
    assert complete(server, max_tokens=5, temperature=0, echo=True).choices[0].text == PROMPT + answer.choices[0].text
    chunks = list(complete(server, max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].usage == answer.usage


def test_several_prompts_and_answers_have_a_seed_each(server, stories):
    ids = stories.tokenizer("Lily went").input_ids
    answer = complete(server, [PROMPT, "Lily went"], max_tokens=6, n=2, seed=3)
    prompts = [PROMPT, PROMPT, "Lily went", "Lily went"]
    expected = [
        alone(stories, Steering(), prompt, seed=3 + index, temperature=1.0, max_new_tokens=6)
        for index, prompt in enumerate(prompts)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    by_ids = complete(server, [ids], max_tokens=6, seed=5)
    assert by_ids.choices[0].text == expected[2]


def test_a_text_ends_before_what_it_shall_stop_at(server):
    whole = complete(server, max_tokens=20, temperature=0).choices[0].text
    stop = whole[12:17]
    answer = complete(server, max_tokens=20, temperature=0, stop=["never there", stop])
    assert answer.choices[0].text == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 20
    chunks = complete(server, max_tokens=20, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_a_saved_steering_is_a_model_too(server, stories):
    names = [model.id for model in server.client.models.list()]
    assert names == ["stories", "stories:owls", "chats"]
    assert server.client.models.retrieve("stories:owls").steerings == ["owls"]
    found = complete(server, model="stories:owls", max_tokens=8, temperature=0).choices[0].text
    assert found == alone(stories, stories.steerings["owls"], temperature=0, seed=0, max_new_tokens=8)
    assert found == complete(server, max_tokens=8, temperature=0, extra_body={"steering": "owls"}).choices[0].text


def test_chats_are_answered_whole_and_in_pieces(server, chats):
    messages = [{"role": "user", "content": "w1 w2"}]
    steering = {"edits": [{"latent": 3, "value": 9.0, "sae": "a"}, {"latent": 4, "value": 5.0, "sae": "b"}]}
    options = {"model": "chats", "messages": messages, "seed": 2, "extra_body": {"steering": steering}}
    answer = server.client.chat.completions.create(max_completion_tokens=6, **options)
    pipe = chats.pipe.with_steering(Steering([LatentEdit(3, 9.0, sae="a"), LatentEdit(4, 5.0, sae="b")]))
    expected = pipe(messages, seed=2, temperature=1.0, top_k=None, max_new_tokens=6)[0]["generated_text"][-1]
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content.strip() == expected["content"].strip()
    chunks = list(server.client.chat.completions.create(max_tokens=6, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]}]
    again = server.client.chat.completions.create(max_tokens=6, **{**options, "messages": parts})
    assert again.choices[0].message.content == message.content


@pytest.mark.parametrize("stream", [False, True])
def test_the_latents_of_each_token_come_back(server, stories, stream):
    """Those of the model as it is steered, on the text that it has written, its last token included."""
    given = {"steering": {"latents": {"5": 3.0}}, "return_latents": {"top": 6, "prompt": True}}
    answer = complete(server, max_tokens=7, temperature=0, stream=stream, extra_body=given)
    if stream:
        answer = list(answer)[-1]
    choice = answer.choices[0]
    text = alone(stories, Steering([LatentEdit(5, 3.0)]), temperature=0, seed=0, max_new_tokens=7)
    tokens = [*choice.prompt_latents, *choice.latents]
    ids = torch.tensor([[one["token_id"] for one in tokens]])
    assert "".join(one["token"] for one in choice.latents) == text
    assert len(choice.latents) == 7
    model, sae, site = stories.pipe.model, stories.pipe.saes[""], resolve_site(stories.pipe.model, "layers.2")
    with Steering([LatentEdit(5, 3.0)]).on(model, sae, stories.pipe.special_ids):
        activations = sae.encode(capture(model, [site], input_ids=ids)[site][0])
    for one, row in zip(tokens, activations, strict=True):
        values, indices = row.topk(6)
        expected = [(i, v) for i, v in zip(indices.tolist(), values.tolist(), strict=True) if v > 0]
        assert [pair["latent"] for pair in one["latents"]] == [index for index, _ in expected]
        assert [pair["activation"] for pair in one["latents"]] == pytest.approx([v for _, v in expected], rel=1e-3)


REFUSED = [
    ({"steering": "cats"}, "steering", "'stories' has no saved steering 'cats'; there are 'owls'"),
    ({"steering": {"latents": {"64": 1.0}}}, "steering", "latent 64 is not there; it has latents 0 … 63"),
    ({"steering": {"latents": {"x": 1.0}}}, "steering", "a latent is a whole number from 0, got 'x'"),
    ({"steering": {"latents": {"5": "strong"}}}, "steering", "the value must be a finite number, got 'strong'"),
    ({"steering": {"latents": {"5": True}}}, "steering", "the value must be a finite number, got True"),
    ({"steering": {"latents": {}}}, "steering", "latents are an object such as"),
    ({"steering": {"latents": {"5": 1}, "units": "miles"}}, "steering", "units out of max, absolute, norm"),
    ({"steering": {"latents": {"5": 1}, "positions": "some"}}, "steering", "positions must be 'all'"),
    ({"steering": {"latents": {"5": 1}, "sae": "b"}}, "steering", "has no SAE 'b'; there are ''"),
    ({"steering": {"latents": {"5": 1}, "lattents": 1}}, "steering", "and no 'lattents'"),
    ({"steering": {"level": 9}}, "steering", "there is no level 9"),
    ({"steering": {"edits": 5}}, "steering", "the steering cannot be done"),
    ({"steering": {"edits": [{"latent": 1}] * 65}}, "steering", "65 edits, where 64 are the most"),
    ({"steering": 5}, "steering", "a steering is the name of a saved one"),
    ({"return_latents": {"top": 0}}, "return_latents", "takes a whole number from 1 as top"),
    ({"return_latents": {"sae": "x"}}, "return_latents", "needs the name of an SAE as sae, out of ''; got 'x'"),
    ({"max_tokens": 101}, None, "max_tokens must be a whole number from 1 to 100, got 101"),
    ({"temperature": -1}, "temperature", "temperature must be a number from 0 to 2, got -1"),
    ({"top_p": 0}, "top_p", "top_p must be a number from"),
    ({"n": 17}, "n", "n must be a whole number from 1 to 16"),
    ({"stop": ["a"] * 5}, "stop", "a text or up to 4 texts"),
    ({"logprobs": 3}, "logprobs", "logprobs=3 is not supported here"),
    ({"steerings": "owls"}, "steerings", "there is no 'steerings' in this request"),
    ({"prompt": {"a": 1}}, "prompt", "prompt must be a text, a list of token ids"),
    ({"prompt": [99999]}, "prompt", "a list of token ids from 0 to"),
    ({"prompt": "word " * 400}, None, "the model reads 256 tokens, and the prompt has"),
    ({"stream": "yes"}, "stream", "stream must be true or false"),
]


@pytest.mark.parametrize(("extra", "param", "said"), REFUSED)
def test_what_cannot_be_is_answered_with_400_and_a_sentence(server, extra, param, said):
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 2, **extra}
    answer = httpx.post(f"{server.url}/completions", json=body, timeout=HANG_SECONDS)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_openais_client_understands_what_is_refused(server):
    for options, status in (({"model": "none"}, 404), ({"extra_body": {"steering": "cats"}}, 400)):
        for stream in (False, True):
            with pytest.raises(APIStatusError) as caught:
                complete(server, max_tokens=2, stream=stream, **options)
            assert caught.value.status_code == status
            assert caught.value.body["message"].startswith(
                ("there is no model 'none'; there are 'stories'", "'stories'")
            )
    with pytest.raises(APIStatusError, match="has no chat template") as caught:
        server.client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.status_code == 400


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "the request is no JSON"),
        (b"[1]", "application/json", 400, "a request is a JSON object"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b"{}", "text/plain", 415, "Content-Type: application/json"),
        (b'"' + b"a" * (1 << 20) + b'"', "application/json", 413, "may have 1,048,576 bytes"),
        (b'{"model": "stories", "prompt": "\\ud800"}', "application/json", 400, "a surrogate stands alone"),
        (b'{"model": "stories", "temperature": NaN}', "application/json", 400, "temperature must be a number"),
    ],
)
def test_bodies_that_are_no_requests(server, body, kind, status, said):
    answer = httpx.post(
        f"{server.url}/completions", content=body, headers={"Content-Type": kind}, timeout=HANG_SECONDS
    )
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_other_places_are_answered_in_the_same_form(server):
    for method, path in (("GET", "/v2"), ("GET", "/v1/completions"), ("POST", "/v1/models")):
        answer = httpx.request(method, server.url.removesuffix("/v1") + path, timeout=HANG_SECONDS)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].startswith(f"there is no {method} {path} here")
    health = httpx.get(server.url.removesuffix("/v1") + "/health", timeout=HANG_SECONDS)
    assert health.json()["status"] == "ok"


def taken(server) -> int:
    return server.app.state.desk.num_taken


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(stories, running, stream):
    """With one place and no line, the next is answered as soon as the one before has left."""
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 200, "n": 16, "stream": stream, "temperature": 0}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: me\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}"
    with running([stories], Limits(max_running=1, max_waiting=0)) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(f"{head}\r\n\r\n".encode() + content)
            if stream:
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
            until(lambda: taken(server) == 1)
            refused = httpx.post(f"{server.url}/completions", json=body, timeout=HANG_SECONDS)
            assert refused.status_code == 429
            assert "and no more may; try again later" in refused.json()["error"]["message"]
        until(lambda: taken(server) == 0)
        assert complete(server, max_tokens=2).choices[0].finish_reason == "length"


def test_a_key_is_asked_for_where_there_is_one(stories, running):
    with running([stories], api_key="secret") as server:
        assert [model.id for model in server.client.models.list()] == ["stories", "stories:owls"]
        answer = httpx.get(f"{server.url}/models", headers={"Authorization": "Bearer other"}, timeout=HANG_SECONDS)
        assert answer.status_code == 401
        assert "wants an API key" in json.loads(answer.text)["error"]["message"]


def test_names_are_one_models_each(stories):
    with pytest.raises(InputError, match="two of the models to serve are called 'stories'"):
        build_app([stories, stories])
    with pytest.raises(InputError, match="max_running must be a whole number from 1, got 0"):
        Limits(max_running=0)
