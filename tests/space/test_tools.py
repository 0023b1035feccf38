"""The page's functions for programs and agents, called over HTTP by Gradio's client and by the MCP client."""

import ast
import asyncio
from typing import Any

import pytest
from msae_space.examples import NEGATIVE, POSITIVE, WORDS, asked, dials_of, search
from msae_space.reading import read
from space_server import Server

from hf_msae.steering import Gate, LatentEdit, SteeredPipeline, Steering

pytestmark = pytest.mark.slow

TOOLS = {
    "list_saes",
    "search_latents",
    "describe_latent",
    "read_tokens",
    "steer_text",
    "steer_with_latents",
    "find_latents",
}
TEXT = "Once upon a time, there was a little owl."


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    gradio_client = pytest.importorskip("gradio_client", reason="needs Gradio (pip install 'hf-msae[space]')")
    return gradio_client.Client(f"http://127.0.0.1:{server.port}", verbose=False)


def call(client: Any, name: str, **arguments: Any) -> Any:
    return client.predict(api_name=f"/{name}", **arguments)


def test_only_typed_functions_are_offered(client):
    offered = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name.strip("/") for name in offered} == TOOLS


def test_the_answers_are_those_of_the_page(client, loaded, index, story_sae):
    (listed,) = call(client, "list_saes")
    assert listed["sae"] == str(story_sae)
    assert listed["prefix_sizes"] == loaded.prefix_sizes

    found = read(loaded, TEXT)
    tokens = call(client, "read_tokens", text=TEXT)
    assert [one["token"] for one in tokens] == list(found.pieces)
    for one, active in zip(tokens, found.active, strict=True):
        assert [(item["latent"], item["activation"]) for item in one["latents"]] == [
            (latent, round(value, 4)) for latent, value in active[: len(one["latents"])]
        ]
        assert len(one["latents"]) == min(5, len(active))
        assert all(item["level"] == loaded.level_of(item["latent"]) for item in one["latents"])

    hits = call(client, "search_latents", words="owl")
    assert [hit["latent"] for hit in hits] == [hit.latent for hit in index.search("owl")]
    latent = next(latent for active in found.active for latent, _ in active)
    page = call(client, "describe_latent", latent=latent)
    view = index.page(latent)
    assert page["name"] == index.name(latent)
    assert page["promotes"] == [one.token for one in view.promoted]
    assert all(context.count("**") == 2 for context in page["contexts"])
    assert [hit["latent"] for hit in page["children"]] == [hit.latent for hit in index.children(latent)]


def test_steered_text_is_that_of_the_pipeline(client, loaded):
    latent = max(range(len(loaded.maxima)), key=loaded.maxima.__getitem__)
    said = call(client, "steer_text", prompt="Once upon a time", latent=latent, strength=0.5, max_new_tokens=8, seed=3)
    for name, edits in (("default", []), ("steered", [LatentEdit(latent, 0.5)])):
        pipeline = SteeredPipeline(loaded.model, loaded.tokenizer, loaded.sae, Steering(edits))
        (written,) = pipeline("Once upon a time", max_new_tokens=8, temperature=0.7, seed=3)
        assert "Once upon a time" + said[name] == written["generated_text"]
    assert set(said["losses"]) == {"default", "steered"}


def test_what_is_found_by_examples_steers_where_a_condition_holds(client, loaded):
    examples = {"positive": POSITIVE.splitlines(), "negative": NEGATIVE.splitlines()}
    found = call(client, "find_latents", **examples, words=WORDS, max_latents=2)
    *_, finding = search(loaded, asked(POSITIVE, NEGATIVE, WORDS, 2))
    assert [(one["latent"], one["strength"]) for one in found["steering"]] == list(dials_of(loaded, finding))
    assert [one["size"] for one in found["levels"]] == loaded.prefix_sizes
    assert {row["name"] for row in found["compared"]} >= {"few latents", "DiffMean of all tokens", "probe"}
    latent = read(loaded, TEXT).active[-1][0][0]
    said = call(
        client,
        "steer_with_latents",
        prompt=TEXT,
        latents=found["steering"],
        only_where=[{"latent": latent, "then": "after"}],
        max_new_tokens=8,
        seed=3,
    )
    gate = Gate(latent, then="after")
    steering = Steering([LatentEdit(one["latent"], one["strength"], when=gate) for one in found["steering"]])
    pipeline = SteeredPipeline(loaded.model, loaded.tokenizer, loaded.sae, steering)
    (written,) = pipeline(TEXT, max_new_tokens=8, temperature=0.7, seed=3)
    assert TEXT + said["steered"] == written["generated_text"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("describe_latent", {"latent": 10**6}, "There are latents|has latents|latents 0 to|no latent"),
        ("read_tokens", {"text": " "}, "is empty"),
        ("steer_text", {"prompt": "Once", "latent": 1, "max_new_tokens": 10_000}, "number of new tokens"),
        ("steer_text", {"prompt": "Once", "latent": 1, "strength": 1e7}, "strength"),
        ("search_latents", {"words": "owl", "sae": "/etc"}, "/etc"),
        ("steer_with_latents", {"prompt": "Once", "latents": [{"latent": 1}]}, "A strength must be"),
        ("steer_with_latents", {"prompt": "Once", "latents": [], "only_where": [{"latent": -1}]}, "latents 0 to"),
        ("find_latents", {"positive": ["a"], "negative": ["b"]}, "There are 1 different positive examples"),
    ],
)
def test_refusals_are_sentences(client, name, arguments, words):
    with pytest.raises(Exception, match=words):
        call(client, name, **arguments)


def test_agents_find_the_functions_as_tools(server):
    pytest.importorskip("mcp", reason="needs MCP (pip install 'hf-msae[mcp]')")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask() -> tuple[list[Any], Any]:
        address = f"http://127.0.0.1:{server.port}/gradio_api/mcp/"
        async with streamablehttp_client(address) as (reading, writing, _), ClientSession(reading, writing) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            said = await session.call_tool("read_tokens", {"text": TEXT})
            return tools, said

    tools, said = asyncio.run(ask())
    assert {tool.name for tool in tools} == TOOLS
    (steer,) = (tool for tool in tools if tool.name == "steer_text")
    assert "with a latent turned up" in steer.description
    assert steer.inputSchema["properties"]["latent"]["type"] in ("integer", "number")
    assert "describe_latent" in steer.inputSchema["properties"]["strength"]["description"]
    assert not said.isError
    assert [one["token"] for one in ast.literal_eval(said.content[0].text)][-3:] == [" little", " owl", "."]
