"""What anybody may send to the page that runs: each request is answered or refused in a sentence, nothing breaks."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msae_space.links import read_query
from msae_space.loaded_sae import Key, SpaceError
from msae_space.reading import MAX_PHRASE_TOKENS, MAX_PROMPT_TOKENS, read, read_levels
from patience import HANG_SECONDS

pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")

from msae_space.gate import MAX_BODY
from msae_space.links import View
from msae_space.shared import BROKEN
from msae_space.tab_steer import run
from space_server import Server

pytestmark = pytest.mark.slow

STATEFUL = "state"


@pytest.fixture
def unbroken(server: Server) -> Iterator[None]:
    """Nothing went wrong in the server."""
    yield
    assert "Traceback" not in server.said.getvalue(), server.said.getvalue()[-3000:]


# Requests


@pytest.mark.usefixtures("unbroken")
def test_pages_of_other_sites_are_not_served(server):
    here = f"127.0.0.1:{server.port}"
    json_type = {"Content-Type": "application/json", "Cookie": "session=1"}
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "x"}).encode()
    foreign = ("https://evil.example", "null", f"http://{here}.evil.example", "http://127.0.0.1:1", "file://", "x")
    for host in (here, "owner-page.hf.space"):
        for origin in foreign:
            for method, path in (("GET", "/config"), ("GET", "/"), ("POST", "/gradio_api/queue/join")):
                status, said = server.ask(method, path, body, {**json_type, "Host": host, "Origin": origin})
                assert (status, b"other sites" in said) == (403, True), (host, origin, path)
        for headers in ({}, {"Origin": f"https://{host}"}):
            assert server.ask("GET", "/config", None, {"Host": host, **headers})[0] == 200
    behind = {"Host": "10.0.0.1", "X-Forwarded-Host": "me.example", "Origin": "https://me.example"}
    assert server.ask("GET", "/config", None, behind)[0] == 200


@pytest.mark.usefixtures("unbroken")
def test_a_space_is_asked_by_its_own_address(server, monkeypatch):
    headers = {"Host": "10.0.0.1:7860", "Origin": "https://owner-page.hf.space"}
    assert server.ask("GET", "/config", None, headers)[0] == 403
    monkeypatch.setenv("SPACE_HOST", "owner-page.hf.space")
    assert server.ask("GET", "/config", None, headers)[0] == 200


@pytest.mark.usefixtures("unbroken")
def test_nothing_is_uploaded_or_fetched(server):
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nhello\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for path in ("upload", "upload/", "upload?upload_id=1", "process_recording", "component_server", "vibe-edit/"):
        assert server.ask("POST", f"/gradio_api/{path}", form, headers)[0] in (404, 405)
    assert server.ask("POST", "/login", b"username=a", headers)[0] == 404
    for path in ("deep_link?session_hash=a", "proxy=http://127.0.0.1/", "file=/etc/passwd", "upload_progress"):
        assert server.ask("GET", f"/gradio_api/{path}")[0] == 404
    for method in ("PUT", "DELETE", "PATCH"):
        assert server.ask(method, "/gradio_api/queue/join", b"{}")[0] == 405
    kept = Path(server.app.app.uploaded_file_dir)
    assert not kept.exists() or not any(path.is_file() for path in kept.rglob("*"))


@pytest.mark.usefixtures("unbroken")
def test_bodies_are_bounded_whatever_they_say_of_themselves(server):
    path, large = "/gradio_api/queue/join", b" " * (MAX_BODY + 1)
    assert server.ask("POST", path, large)[0] == 413
    assert server.ask("POST", path, b"{}", {"Content-Length": "9" * 30})[0] in (400, 413)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_SECONDS)
    connection.request("POST", path, iter([large[: MAX_BODY // 2]] * 3), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


ODD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"data": null}',
    b'{"data": [], "session_hash": "a"}',
    b'{"data": [], "session_hash": "a", "fn_index": 1000000}',
    b'{"data": [], "session_hash": "a", "fn_index": -1}',
    b'{"data": [], "session_hash": "a", "fn_index": "x"}',
    b'{"data": [], "session_hash": "a", "fn_index": 1e400}',
    b'{"data": [], "session_hash": [], "fn_index": 0}',
    b'{"data": [], "session_hash": "a", "fn_index": ' + b"9" * 5000 + b"}",
    b'{"data": [' + b"9" * 5000 + b'], "session_hash": "a", "fn_index": 0}',
    b'{"data": [NaN, 1e400], "session_hash": "a", "fn_index": 0, "trigger_id": -7}',
    b'{"data": ["\\ud800"], "session_hash": "\\ud800", "fn_index": 0}',
]


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
def test_odd_bodies_are_answered(server, body):
    for path in ("queue/join", "call/search_latents", "run/search_latents", "mcp/", "cancel", "reset"):
        status, said = server.ask("POST", f"/gradio_api/{path}", body, {"Content-Type": "application/json"})
        # With 500, Gradio gives a handler's refusal to a program.
        assert status < 500 or (status == 500 and json.loads(said)["error"]), (path, said)


# Handlers

ODD_TEXT = st.sampled_from(
    ["²", "9" * 5000, "1e400", "-1", "#12", "０１２", "\ud800", "\x00", "../..", "🙂" * 2000, "a" * 2001, " ", "owl"]
) | st.text(st.characters(codec=None), max_size=30)
ODD_NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.5, 1.5, True]) | (
    st.integers(-300, 300)
)
ODD = st.recursive(
    st.none() | st.booleans() | ODD_TEXT | ODD_NUMBERS,
    lambda inside: st.lists(inside, max_size=10) | st.dictionaries(st.text(max_size=6), inside, max_size=3),
    max_leaves=12,
)
DIAL = st.fixed_dictionaries({}, optional={"latent": ODD_NUMBERS | ODD, "value": ODD_NUMBERS | ODD})
CONDITION = st.fixed_dictionaries(
    {}, optional={"latent": ODD_NUMBERS, "above": ODD_NUMBERS | ODD, "then": st.sampled_from(["here", "after"]) | ODD}
)
DIALS = (
    st.fixed_dictionaries(
        {"dials": st.lists(DIAL, max_size=10) | ODD, "html": ODD_TEXT},
        optional={"conditions": st.lists(CONDITION, max_size=6) | ODD},
    )
    | ODD
)
FILES = st.just({"path": "/etc/passwd", "url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}})
ACTIONS = (
    st.sampled_from(
        ["token", "latent", "steer", "page", "top", "take", "add", "remove", "condition", "free", "apply", "x"]
    )
    | ODD
)
EVENTS = (
    st.fixed_dictionaries({}, optional={"action": ACTIONS, "id": ODD_NUMBERS | ODD, "value": ODD, "index": ODD}) | ODD
)


def sent_values(server: Server, handler: dict[str, Any], data: st.DataObject) -> list[Any]:
    """What the page itself would send, with one value or more changed."""
    values = []
    for number in handler["inputs"]:
        component = server.component(number)
        value = component["props"].get("value")
        values.append(None if component["type"] == STATEFUL else value)
    changed = data.draw(st.sets(st.integers(0, max(0, len(values) - 1)), min_size=1, max_size=3), label="changed")
    for place in changed & set(range(len(values))):
        values[place] = data.draw(DIALS | FILES | ODD, label=f"value {place}")
    return values[: data.draw(st.sampled_from([len(values)] * 9 + [max(0, len(values) - 1)]))]


@pytest.mark.usefixtures("unbroken")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_a_handler_is_sent_it_answers_in_a_sentence_or_not_at_all(server, data):
    handler = data.draw(st.sampled_from(server.handlers), label="handler")
    said = server.call(handler, sent_values(server, handler, data), data.draw(EVENTS, label="event"))
    if not said["success"]:
        words = said["output"]["error"]
        assert words, "an empty error"
        assert words != BROKEN
        assert len(words) < 600
    assert "Traceback" not in server.said.getvalue(), server.said.getvalue()[-3000:]


QUERIES = st.dictionaries(
    st.sampled_from(
        "sae in tab prompt latents when method at temperature tokens seed text latent level".split()  # noqa: SIM905
    ),
    ODD_TEXT
    | st.sampled_from(
        [
            "1:1e400",
            "1:nan",
            "1:2:3",
            ":",
            "1:" + "9" * 5000,
            ",".join(["1:1"] * 100),
            "1:-0",
            "1:0:here",
            "1:nan:after",
        ]
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(QUERIES)
def test_any_link_is_a_view_of_values_that_the_page_can_show(query):
    found = read_query(query, Key("owner/name"))
    assert set(found.problems) <= set(query)
    again = read_query(dict(pair for pair in query.items() if pair[0] not in found.problems), Key("owner/name"))
    assert again == found


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize(
    "query",
    [
        "latents=5:1e400&seed=" + "9" * 5000,
        "latents=5:1&when=999999999:0:here",
        "latents=" + "%2C".join(["1:1"] * 100),
        "latent=%C2%B2&level=%C2%B2&tokens=5&temperature=2",
        "sae=nobody%2Fnothing&in=..%2F..",
        "latents=999999999:1&tab=explore&latent=999999999",
        "tab=explore&method=%00&text=%F0%9F%99%82",
    ],
)
def test_odd_links_open_the_page(server, query):
    (load,) = (one for one in server.handlers if any(event == "load" for _, event in one["targets"]))
    said = server.call(load, [], query=query)
    assert said["success"], said


# Numbers of tokens


def too_long() -> list[str]:
    """Texts within the page's number of characters and far beyond its number of tokens."""
    return ["🙂" * 1900, "ž" * 1900, "\u0f00\u0f40" * 950]


@pytest.mark.parametrize("text", too_long(), ids=["emoji", "letters", "tibetan"])
def test_texts_of_many_tokens_never_reach_the_model(loaded, index, text):
    assert len(loaded.tokenizer(text).input_ids) > MAX_PROMPT_TOKENS
    runs = []
    handles = [one.register_forward_pre_hook(lambda *_: runs.append(1)) for one in (loaded.model, index._searched)]
    try:
        view = View(loaded.key, prompt=text)
        for action in (
            lambda: next(run(loaded, view, "a")),
            lambda: read(loaded, text),
            lambda: read_levels(loaded, text),
            lambda: index.search(text[: 3 * MAX_PHRASE_TOKENS]),
        ):
            with pytest.raises(SpaceError, match="tokens"):
                action()
    finally:
        for handle in handles:
            handle.remove()
    assert runs == []


def test_prompts_leave_room_for_what_is_written(loaded):
    """The story model has 256 positions."""
    assert loaded.language.num_positions == 256
    prompt = "One day, Tom went to the garden. " * 20
    number = len(loaded.tokenizer(prompt).input_ids)
    assert 150 < number < 256
    view = View(loaded.key, prompt=prompt, max_new_tokens=256 - number)
    assert next(run(loaded, view, "a"))
    longer = View(loaded.key, prompt=prompt, max_new_tokens=257 - number)
    with pytest.raises(SpaceError, match=f"has {number} tokens"):
        next(run(loaded, longer, "a"))
