"""The Space without a browser: what it computes, what it refuses, what it shows, and how it is published."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from msae_space import drawing
from msae_space.dials import MAX_DIALS, added, draw_dials, read_dials
from msae_space.generation import Runs, stream
from msae_space.library import NUM_OPEN, Key, Library, SpaceError, Workbench
from msae_space.links import View, as_python, read_query
from msae_space.meaning import READING, Meaning, own_modules
from msae_space.presets import Preset, by_promotion, published
from msae_space.reading import MAX_TOKENS, activations, encode_text, read, read_levels, surprise
from msae_space.settings import Settings, read_settings
from msae_space.strengths import FLUENT_SHARE, Dial, edits, fluent_up_to, limit, starting_value
from msae_space.trials import MIN_MOVED, find_places
from msae_space.zerogpu import on_gpu

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.cli.space import copy_package, space_folder
from hf_msae.evaluation.meta import decompose, train_meta_sae
from hf_msae.metrics import measure_cross_entropy
from hf_msae.sites import capture
from hf_msae.steering import LatentEdit, PrefixEdit, SteeredPipeline, Steering, save_steering

TEXT = "Once upon a time, there was a little owl. She lived in the forest with her mother."
PROMPT = "Once upon a time, there was a"
EVIL = '<img src=x onerror="alert(1)">${alert(2)}`{{value}}'
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def library(story_sae: Path) -> Library:
    return Library((str(story_sae),))


@pytest.fixture(scope="session")
def bench(library: Library, story_sae: Path) -> Workbench:
    return library.open(Key(str(story_sae)))


@pytest.fixture(scope="session")
def meaning(bench: Workbench) -> Meaning:
    found = Meaning(bench)
    found.wait()
    assert found.progress == ""
    return found


def texts(
    bench: Workbench, steering: Steering, *, seed: int = 0, tokens: int = 20, stopped=None, prompt: str = PROMPT
):
    """The last of a stream."""
    *_, last = stream(
        bench,
        prompt,
        steering,
        seed=seed,
        temperature=0.7,
        max_new_tokens=tokens,
        stopped=stopped or threading.Event(),
    )
    return last


# Reading


def test_reading_is_what_the_sae_encodes(bench):
    found = read(bench, TEXT)
    ids = bench.tokenizer(TEXT, return_tensors="pt").input_ids
    expected = bench.sae.encode(capture(bench.model, [bench.site], input_ids=ids)[bench.site][0])
    assert "".join(found.pieces) == bench.tokenizer.decode(ids[0])
    assert found.special == (True, *[False] * (ids.shape[1] - 1))
    assert found.active[0] == ()
    for row, active in zip(expected[1:], found.active[1:], strict=True):
        assert {latent for latent, _ in active} == set(row.nonzero().flatten().tolist())
        assert [value for _, value in active] == sorted((value for value in row[row > 0].tolist()), reverse=True)
    strongest = found.active[5][0]
    assert found.values(strongest[0])[5] == strongest[1]


def test_levels_agree_with_the_packages_own_measurement(bench):
    pieces, levels = read_levels(bench, TEXT)
    ids = bench.tokenizer(TEXT, return_tensors="pt").input_ids
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[0, 0] = False
    batch = {"input_ids": ids, "attention_mask": None, "keep": keep}
    mean = torch.zeros(128)
    measured = measure_cross_entropy(bench.model, bench.site, bench.sae, mean, [batch])
    number = ids.shape[1]
    assert len(pieces) == number
    assert [level.prefix for level in levels] == [32, 128, 256]
    for level, other in zip(levels, measured.levels, strict=True):
        # The package counts predictions after tokens that were replaced: all but the one after BOS, which is left
        # as it is and so predicted alike.
        assert level.kl[0] == pytest.approx(0, abs=1e-6)
        assert sum(level.kl[1:-1]) / (number - 2) == pytest.approx(other.kl, rel=1e-4)
        assert (level.ce - level.ce_clean) * (number - 1) / (number - 2) == pytest.approx(other.ce_increase, rel=1e-3)
    x = capture(bench.model, [bench.site], input_ids=ids)[bench.site][0, 1:]
    error = (x - bench.sae.decode(bench.sae.encode(x), 32)).square().sum()
    assert levels[0].fve == pytest.approx(1 - (error / (x - x.mean(0)).square().sum()).item(), abs=1e-5)
    assert 0 < levels[0].fve < levels[-1].fve < 1


def test_what_is_read_is_not_disturbed_by_others(bench):
    """Many read at once, and somebody else steers meanwhile: everybody gets what they would get alone."""
    expected = activations(bench, encode_text(bench, TEXT))[0]
    other_text = "Lily went to the garden. " * 5
    other = activations(bench, encode_text(bench, other_text))[0]
    problems: list[str] = []
    stopped = threading.Event()

    def read_often(text: str, wanted: torch.Tensor) -> None:
        for _ in range(20):
            if not torch.equal(activations(bench, encode_text(bench, text))[0], wanted):
                problems.append(text)

    def steer_on() -> None:
        texts(bench, Steering([LatentEdit(3, 2.0)]), tokens=60, stopped=stopped)

    threads = [threading.Thread(target=read_often, args=pair) for pair in ((TEXT, expected), (other_text, other))]
    threads.append(threading.Thread(target=steer_on))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(
    ("text", "words"), [("  ", "no text"), ("owl " * MAX_TOKENS, f"reads up to {MAX_TOKENS}")], ids=["empty", "long"]
)
def test_texts_that_cannot_be_read(bench, text, words):
    with pytest.raises(SpaceError, match=words):
        read(bench, text)


def test_surprise_is_the_loss_of_the_continuation(bench):
    ids = bench.tokenizer(TEXT, return_tensors="pt").input_ids
    before = len(bench.tokenizer(PROMPT).input_ids)
    labels = ids.clone()
    labels[:, :before] = -100
    with torch.no_grad():
        expected = bench.model(input_ids=ids, labels=labels).loss.item()
    assert surprise(bench, PROMPT, TEXT.removeprefix(PROMPT)) == pytest.approx(expected, rel=1e-4)
    assert surprise(bench, PROMPT, "") is None


# Generation


def test_no_strength_writes_the_default_text(bench):
    found = texts(bench, Steering([LatentEdit(3, 0.0)]))
    assert found.done
    assert found.steered == found.default != ""


def test_text_streams_and_is_that_of_the_pipeline(bench):
    steering = Steering([LatentEdit(3, 1.5), LatentEdit(40, -1.0)])
    grown = list(
        stream(bench, PROMPT, steering, seed=4, temperature=0.7, max_new_tokens=20, stopped=threading.Event())
    )
    lengths = [len(found.steered) for found in grown]
    assert len(set(lengths)) > 5
    assert lengths == sorted(lengths)
    for name, what in (("steered", steering), ("default", Steering())):
        pipe = SteeredPipeline(bench.model, bench.tokenizer, bench.sae, what)
        answer = pipe(PROMPT, seed=4, temperature=0.7, max_new_tokens=20)[0]["generated_text"]
        assert PROMPT + getattr(grown[-1], name) == answer
    assert grown[-1].steered != grown[-1].default


def test_the_first_new_word_keeps_its_space(bench, lm, tokenizer):
    """Many tokenizers drop the space before the first token that they decode, and transformers' pipeline with them."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[32], k=4, site="layers.0"))
    other = replace(bench, key=Key("w"), sae=sae.eval(), model=lm, tokenizer=tokenizer)
    *_, last = stream(other, "w1 w2 w3", Steering(), seed=0, temperature=0.7, max_new_tokens=8)
    pipe = SteeredPipeline(lm, tokenizer, sae, Steering())
    answer = pipe("w1 w2 w3", seed=0, temperature=0.7, max_new_tokens=8)[0]["generated_text"]
    assert last.default == f" {answer.removeprefix('w1 w2 w3')}"


def test_streams_at_once_do_not_mix(bench):
    wishes = [Steering([LatentEdit(latent, 2.0)]) for latent in (1, 5, 9)]
    alone = [texts(bench, wish, seed=seed) for seed, wish in enumerate(wishes)]
    found: dict[int, object] = {}

    def write(seed: int) -> None:
        found[seed] = texts(bench, wishes[seed], seed=seed)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(3)] == alone


def test_stopping_ends_both_texts_early(bench):
    stopped = threading.Event()
    for found in stream(bench, PROMPT, Steering(), seed=0, temperature=0.7, max_new_tokens=200, stopped=stopped):
        last = found
        if len(found.default) > 20:
            stopped.set()
    whole = texts(bench, Steering(), tokens=200)
    assert last.done
    assert len(last.default) < len(whole.default) / 2
    assert whole.default.startswith(last.default)


def test_leaving_the_stream_ends_its_threads(bench):
    before, stopped = threading.active_count(), threading.Event()
    running = stream(bench, PROMPT, Steering(), seed=0, temperature=0.7, max_new_tokens=200, stopped=stopped)
    next(running)
    assert threading.active_count() > before
    running.close()
    assert threading.active_count() == before
    assert stopped.is_set()


def test_what_goes_wrong_in_a_thread_is_raised(bench):
    with pytest.raises(ValueError, match="latent 999 is not there"):
        texts(bench, Steering([LatentEdit(999, 1.0)]))


def test_a_visitor_ends_only_their_own_run():
    runs = Runs()
    first, other = runs.begin("a"), runs.begin("b")
    second = runs.begin("a")
    assert first.is_set()
    assert not second.is_set()
    assert not other.is_set()
    assert runs.is_superseded("a", first)
    assert not runs.is_superseded("a", second)
    runs.end("a", first)  # an ended run does not take the next one with it
    runs.stop("a")
    assert second.is_set()
    assert not other.is_set()
    runs.stop("nobody")


# Dials


def test_the_band_is_a_share_of_the_activations_length(bench, meaning):
    x, _ = activations(bench, encode_text(bench, TEXT))
    assert meaning.mean_norm == pytest.approx(x[1:].norm(dim=-1).mean().item(), rel=0.15)
    norm, sae = meaning.mean_norm, bench.sae
    for latent in range(20):
        shift = fluent_up_to(bench, norm, latent) * (sae.max_activation[latent] * sae.W_dec[latent]).norm().item()
        assert shift == pytest.approx(FLUENT_SHARE * norm)
        assert 0 < starting_value(bench, norm, latent) < fluent_up_to(bench, norm, latent) + 0.05
        assert starting_value(bench, norm, latent) < limit(bench, norm, latent)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"dials": [{"latent": 256, "value": 1}]}, "latents 0 to 255"),
        ({"dials": [{"latent": -1, "value": 1}]}, "latents 0 to 255"),
        ({"dials": [{"latent": 1, "value": "nan"}]}, "finite"),
        ({"dials": [{"latent": 1}]}, "unreadable"),
        ({"dials": 3}, "unreadable"),
        ([1], "unreadable"),
        ({"dials": [{"latent": one, "value": 1} for one in range(MAX_DIALS + 1)]}, f"Up to {MAX_DIALS}"),
    ],
)
def test_dials_from_a_browser_are_checked(bench, value, words):
    with pytest.raises(SpaceError, match=words):
        read_dials(value, bench)


def test_latents_without_a_maximum_are_steered_in_shares_of_the_activation(bench, meaning):
    """As those of checkpoints from other libraries, which do not say it."""
    foreign = replace(bench, maxima=[0.0] * 256)
    assert fluent_up_to(foreign, meaning.mean_norm, 3) == FLUENT_SHARE
    assert edits(foreign, [Dial(3, 0.4)], "add") == [LatentEdit(3, 0.4, "add", "norm")]
    assert "× norm" in draw_dials(foreign, meaning, [Dial(3, 0.4)], "add")["html"]
    code = as_python(foreign, View(foreign.key, prompt=PROMPT, dials=(Dial(3, 0.4),)))
    assert "LatentEdit(3, 0.4, method='add', units='norm')" in code
    # On tokens of mean length, the same shift.
    strong = [fluent_up_to(one, meaning.mean_norm, 3) for one in (bench, foreign)]
    shifts = [
        strong[0] * (bench.sae.max_activation[3] * bench.sae.W_dec[3]).norm().item(),
        strong[1] * meaning.mean_norm,
    ]
    assert shifts[0] == pytest.approx(shifts[1])


def test_dials_are_added_changed_and_full():
    dials = [Dial(latent, 1.0) for latent in range(MAX_DIALS)]
    assert added(dials, Dial(2, 0.5))[2] == Dial(2, 0.5)
    assert len(added(dials, Dial(2, 0.5))) == MAX_DIALS
    assert added([], Dial(7, 1.0)) == [Dial(7, 1.0)]
    with pytest.raises(SpaceError, match="remove one first"):
        added(dials, Dial(99, 1.0))


def test_drawn_dials_are_read_back(bench, meaning):
    dials = [Dial(3, 0.25), Dial(200, -1.0)]
    drawn = draw_dials(bench, meaning, dials, "add")
    assert read_dials(drawn, bench) == dials
    assert drawn["html"].count('type="range"') == 2
    assert "level 1" in drawn["html"]
    assert "level 3" in drawn["html"]
    assert edits(bench, dials, "clamp") == [LatentEdit(3, 0.25, "clamp"), LatentEdit(200, -1.0, "clamp")]
    with pytest.raises(SpaceError, match="no method 'shout'"):
        edits(bench, dials, "shout")


# Links and code

KEYS = st.builds(Key, st.sampled_from(["owner/name", "/a b/ü?&=#"]), st.sampled_from(["", "layers.2/16k"]))
DIALS = st.lists(
    st.builds(Dial, st.integers(0, 10**6), st.integers(-400, 400).map(lambda value: value / 20)), max_size=4
)
VIEWS = st.builds(
    View,
    key=KEYS,
    tab=st.sampled_from(["steer", "tree"]),
    prompt=st.text(max_size=50),
    dials=DIALS.map(tuple),
    method=st.sampled_from(["add", "clamp", "scale", "ablate"]),
    positions=st.sampled_from(["all", "generated"]),
    temperature=st.integers(0, 30).map(lambda value: value / 20),
    max_new_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**31 - 1),
    text=st.text(max_size=50),
    latent=st.none() | st.integers(0, 10**6),
    level=st.none() | st.integers(1, 9),
)


@settings(max_examples=200, deadline=None)
@given(VIEWS)
def test_a_link_restores_everything(view):
    query = {name: values[0] for name, values in parse_qs(view.query(), keep_blank_values=True).items()}
    found = read_query(query, Key("another/default"))
    assert found == view
    assert found.problems == ()


def test_what_a_link_says_wrongly_is_named_and_left_out():
    query = {"latents": "1:x", "temperature": "hot", "tokens": "9999", "method": "shout", "seed": "-1", "tab": "x"}
    found = read_query(query, Key("owner/name"))
    assert found == View(Key("owner/name"))
    assert set(found.problems) == set(query)
    assert read_query({"latents": "1:inf"}, Key("a/b")).problems == ("latents",)


def test_copied_python_prints_the_steered_text(bench):
    view = View(bench.key, prompt=PROMPT, dials=(Dial(3, 1.5), Dial(40, -1.0)), max_new_tokens=15, seed=4)
    code = as_python(bench, view)
    steering = Steering(edits(bench, view.dials, view.method))
    expected = PROMPT + texts(bench, steering, seed=4, tokens=15).steered
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == expected.strip()


def test_python_of_a_hub_model_loads_it_at_its_revision(bench):
    config = MatryoshkaSAEConfig(**{**bench.sae.config.to_dict(), "base_model": "o/lm", "base_model_revision": "abc"})
    sae = MatryoshkaSAE(config)
    code = as_python(replace(bench, sae=sae, key=Key("me/sae", "l2")), View(Key("me/sae", "l2"), prompt=EVIL))
    compile(code, "code", "exec")
    assert "AutoModelForCausalLM.from_pretrained('o/lm', revision='abc')" in code
    assert "MatryoshkaSAE.from_pretrained('me/sae', subfolder='l2')" in code
    assert repr(EVIL) in code


# Meaning


def test_names_and_pages_come_from_the_interpretation(bench, meaning):
    page = meaning.page(5)
    assert page is not None
    assert page.latent == 5
    assert meaning.name(5) == page.name
    with pytest.raises(SpaceError, match="latents 0 to 255"):
        meaning.page(256)


def test_search_begins_with_latents_that_promote_the_word(bench, meaning):
    hits = meaning.search("owl")
    assert [hit.promotes for hit in hits] == sorted((hit.promotes for hit in hits), reverse=True)
    effects = {
        page.latent: max(one.effect for one in page.promoted if one.token.strip() == "owl") * page_maximum
        for page in (meaning.page(hit.latent) for hit in hits if hit.promotes)
        for page_maximum in [bench.sae.max_activation[page.latent].item()]
    }
    assert list(effects.values()) == sorted(effects.values(), reverse=True)
    for hit in hits:
        if hit.promotes:
            assert hit.why == f"“owl” {effects[hit.latent]:+.1f}"


def test_search_finds_latents_that_fire_on_a_word(bench, meaning):
    hits = meaning.search("owl")
    place = next(place for place, piece in enumerate(read(bench, TEXT).pieces) if piece.strip() == "owl")
    firing = {latent for latent, _ in read(bench, TEXT).active[place]}
    assert hits
    assert any("owl" in hit.why for hit in hits)
    assert {hit.latent for hit in hits if "“owl”" in hit.why} & firing
    assert [hit.latent for hit in meaning.search("#12")] == [12]


@pytest.mark.parametrize(("words", "problem"), [("256", "0 to 255"), (" ", "Type a word"), ("...", "no words")])
def test_searches_that_cannot_be_made(meaning, words, problem):
    with pytest.raises(SpaceError, match=problem):
        meaning.search(words)


def test_own_modules_share_weights_and_no_hooks(bench):
    twin = own_modules(bench.model)
    assert all(a is b for a, b in zip(twin.parameters(), bench.model.parameters(), strict=True))
    handle = twin.get_submodule(bench.site.path).register_forward_hook(lambda *_: pytest.fail("the twin's hook ran"))
    activations(bench, encode_text(bench, TEXT))
    handle.remove()


def test_without_an_interpretation_only_numbers_are_found(bench, tmp_path):
    bench.sae.save_pretrained(tmp_path / "bare")
    config = MatryoshkaSAEConfig.from_pretrained(tmp_path / "bare")
    config.base_model = "somebody/lm"
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "bare", config=config).eval()
    bare = Meaning(replace(bench, sae=sae, key=Key(str(tmp_path / "bare"))))
    bare.wait()
    assert bare.progress != READING
    assert "hf-msae interpret" in bare.progress
    assert bare.page(3) is None
    assert bare.presets() == []
    assert bare.roots() == []
    assert [hit.latent for hit in bare.search("3")] == [3]
    with pytest.raises(SpaceError, match="only be found by their numbers"):
        bare.search("owl")


# A meta-SAE


def test_a_latent_is_taken_apart(bench, meaning, tmp_path):
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    from msae_space.tab_compare import draw_parts

    meta = train_meta_sae(bench.sae, num_latents=64, k=3, max_steps=30, random_control=False).sae.eval()
    meta.save_pretrained(tmp_path / "meta")
    (expected,) = decompose(meta, bench.sae, [5])
    drawn = draw_parts(bench, meaning, str(tmp_path / "meta"), 5)
    assert f"{len(expected.parts)} meta-latents" in drawn
    assert f"cosine of {expected.cosine:.2f}" in drawn
    for part in expected.parts:
        assert f"Meta-latent {part.meta_latent}, weight {part.activation:.2f}" in drawn
        assert all(f'data-id="{other}"' in drawn for other, _ in part.shared_with)
    other = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[64], k=4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SpaceError, match="16 dimensions"):
        draw_parts(bench, meaning, str(tmp_path / "other"), 5)


# Presets


def test_tried_presets_do_what_they_say(bench, meaning):
    """Recomputed here: the named words are likelier, by as much as is said."""
    presets = meaning.presets()
    assert presets
    for preset in presets[:3]:
        said = [int(number) / 100 for number in re.findall(r"(\d+)%", preset.why)]
        ids = bench.tokenizer(preset.prompt, return_tensors="pt").input_ids
        words = [
            bench.tokenizer(f" {word}", add_special_tokens=False).input_ids[-1] for word in preset.name.split(", ")
        ]
        found = []
        for steering in (Steering(edits(bench, preset.dials, preset.method)), Steering()):
            with torch.no_grad(), steering.on(bench.model, bench.sae, bench.special_ids):
                logits = bench.model(input_ids=ids).logits[0, -1]
            found.append(logits.softmax(-1)[words].sum().item())
        assert found == pytest.approx(said, abs=0.006)
        assert found[0] - found[1] >= MIN_MOVED
    names = [word for preset in presets for word in preset.name.split(", ")]
    assert len(set(names)) == len(names), "two presets promise the same"


def test_presets_are_kept_for_the_next_start(bench, meaning):
    started = time.monotonic()
    again = Meaning(bench)
    again.wait()
    assert again.presets() == meaning.presets()
    assert time.monotonic() - started < 2, "they were tried out again"


def test_places_are_where_the_text_is_open(bench, meaning):
    places = find_places(bench, meaning._model, meaning.mean_norm, range(32))
    assert [place.moved for place in places] == sorted((place.moved for place in places), reverse=True)
    for place in places[:3]:
        ids = bench.tokenizer(place.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            clean = bench.model(input_ids=ids).logits[0, -1].softmax(-1)
        assert clean[list(place.tokens)].min() > 0.003, "a word that was out of order"
        assert not place.prompt.endswith((".", "!", "?"))


def test_presets_by_promotion_share_no_word(bench, meaning):
    presets = by_promotion(bench, meaning._found, meaning.mean_norm)
    words = [word for preset in presets for word in preset.name.split(", ")]
    assert len(words) == len(set(words)) == 3 * len(presets)
    for preset in presets:
        promoted = [one.token.strip() for one in meaning.page(preset.dials[0].latent).promoted]
        assert set(preset.name.split(", ")) <= set(promoted)


def test_published_steerings_are_the_presets(bench, tmp_path):
    bench.sae.save_pretrained(tmp_path)
    maximum = bench.sae.max_activation[3].item()
    for steering in (
        Steering([LatentEdit(3, 1.5), LatentEdit(40, -1.0)], name="two", description="of them"),
        Steering([LatentEdit(3, 2 * maximum, units="absolute")], name="absolute"),
        Steering([LatentEdit(3, 1.0), LatentEdit(4, method="ablate")], name="two methods"),
        Steering([PrefixEdit(0)], name="a prefix"),
        Steering([LatentEdit(999, 1.0)], name="no such latent"),
    ):
        save_steering(steering, tmp_path)
    found = published(replace(bench, key=Key(str(tmp_path))))
    assert found == [
        Preset("two", (Dial(3, 1.5), Dial(40, -1.0)), why="of them"),
        Preset("absolute", (Dial(3, pytest.approx(2.0)),)),
    ]
    assert published(bench) == []


# Drawing


def test_whatever_is_drawn_is_escaped(bench, meaning):
    pieces = [
        drawing.text(EVIL),
        drawing.tokens([EVIL], [0.5], titles=[EVIL]),
        drawing.tokens([EVIL], [0.5], clickable=False),
        drawing.latent_button(1, EVIL, 0, extra=EVIL),
        drawing.note(EVIL, "problem"),
        drawing.table([EVIL], [[EVIL, EVIL]], of_words=True),
        drawing.bars([1.0], EVIL, EVIL, EVIL),
        drawing.section(EVIL, ""),
        drawing.button(EVIL, "steer", 1),
    ]
    for piece in pieces:
        assert "<img" not in piece
        assert "&lt;img" in piece
        assert not re.search(r'="[^"]*onerror="', piece)


def test_no_data_enters_a_template():
    """Gradio evaluates a filled template as JavaScript, so templates are fixed and say `${value...}` alone."""
    sources = [path.read_text() for path in (space_folder() / "msae_space").glob("*.py")]
    templates = [match for text in sources for match in re.findall(r"html_template=(\w+)", text)]
    assert templates == ["TEMPLATE"]
    assert sum(text.count('TEMPLATE = "${value.html}"') for text in sources) == 1


# Library and settings


def test_a_visitor_reads_no_folder_of_the_machine(library, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for source in (str(tmp_path), "../secret", "a b", "x" * 200):
        with pytest.raises(SpaceError, match="owner/name"):
            library.entries(source)


def test_a_repo_that_is_not_there_is_told(library, hub):
    with pytest.raises(ValueError, match="no folder and no Hub repo somebody/nothing"):
        library.entries("somebody/nothing")


def test_hub_saes_open_with_their_model_and_code_is_never_run(hub, library, lm, tokenizer, tmp_path):
    lm.push_to_hub("tester/lm")
    tokenizer.push_to_hub("tester/lm")
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4}
    for name, base in (("good", "tester/lm"), ("gone", "tester/none"), ("path", "../lm"), ("silent", None)):
        MatryoshkaSAE(MatryoshkaSAEConfig(**shape, site="layers.0", base_model=base)).push_to_hub(f"tester/{name}")
    bench = library.open(Key("tester/good"))
    assert str(bench.site) == "model.layers.0:output"
    assert bench.model.config.vocab_size == lm.config.vocab_size
    for name, words in (("gone", "'tester/none'.*cannot be loaded"), ("path", "'../lm'"), ("silent", "does not say")):
        with pytest.raises(SpaceError, match=words):
            library.open(Key(f"tester/{name}"))
    with pytest.raises(SpaceError, match="no SAE 'other'"):
        library.open(Key("tester/good", "other"))
    code = b'raise SystemExit("the code of a model ran")'
    config = b'{"model_type": "strange", "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}}'
    hub.put("tester/strange", {"config.json": config, "strange.py": code})
    strange = MatryoshkaSAEConfig(**shape, site="layers.0", base_model="tester/strange")
    MatryoshkaSAE(strange).push_to_hub("tester/coded")
    with pytest.raises(SpaceError, match="code of their own"):
        library.open(Key("tester/coded"))


def test_a_model_too_large_for_the_machine_is_refused_before_its_weights(hub, library, lm):
    config = {**lm.config.to_dict(), "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 200}
    hub.put("tester/huge", {"config.json": json.dumps(config).encode()})
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4}
    MatryoshkaSAE(MatryoshkaSAEConfig(**shape, site="layers.0", base_model="tester/huge")).push_to_hub("tester/toobig")
    with pytest.raises(SpaceError, match=r"billion parameters and needs about [\d]+ GiB"):
        library.open(Key("tester/toobig"))


def test_few_saes_stay_open_and_share_their_model(story_sae, tmp_path):
    sae = MatryoshkaSAE.from_pretrained(story_sae)
    folders = [str(tmp_path / str(index)) for index in range(NUM_OPEN + 1)]
    for folder in folders:
        sae.save_pretrained(folder)
    library = Library(tuple(folders))
    benches = [library.open(Key(folder)) for folder in folders]
    assert all(bench.model is benches[0].model for bench in benches)
    assert library.open(Key(folders[-1])) is benches[-1]
    assert library.open(Key(folders[0])) is not benches[0]


def test_nobody_waits_for_what_somebody_else_loads(story_sae, tmp_path):
    MatryoshkaSAE.from_pretrained(story_sae).save_pretrained(tmp_path / "other")
    here, slow = Key(str(story_sae)), Key(str(tmp_path / "other"))
    began, go_on = threading.Event(), threading.Event()

    class Slow(Library):
        def _load(self, key: Key) -> Workbench:
            if key == slow:
                began.set()
                assert go_on.wait(60)
            return super()._load(key)

    library = Slow((here.source, slow.source))
    first = library.open(here)
    loading = [threading.Thread(target=library.open, args=(slow,)) for _ in range(2)]
    for thread in loading:
        thread.start()
    assert began.wait(60)
    assert library.open(here) is first, "it was not had while another was loaded"
    go_on.set()
    for thread in loading:
        thread.join()
    assert library.open(slow).key == slow


def test_settings_are_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "space.json"
    monkeypatch.setenv("MSAE_SPACE", str(path))
    with pytest.raises(ValueError, match=r"There is no .*space\.json"):
        read_settings()
    path.write_text('{"saes": ["a/b"], "title": "T"}')
    assert read_settings() == Settings(("a/b",), None, "T")
    for text, words in (("{", "cannot be read"), ('{"saes": []}', "at least one"), ('{"sae": "a"}', "unknown key")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_settings()


def test_zerogpu_lends_a_gpu_only_where_its_package_is(tmp_path, monkeypatch):
    def function() -> int:
        return 1

    assert on_gpu(function) is function
    (tmp_path / "empty" / "spaces").mkdir(parents=True)  # a folder of that name, as the repository has
    monkeypatch.syspath_prepend(tmp_path / "empty")
    assert on_gpu(function) is function
    monkeypatch.delitem(sys.modules, "spaces", raising=False)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "spaces.py").write_text("def GPU(function):\n    return lambda: function() + 41\n")
    monkeypatch.syspath_prepend(tmp_path / "real")
    assert on_gpu(function)() == 42
    sys.modules.pop("spaces")


# As ZeroGPU does it: each call in a forked process, its arguments and results pickled, the latter one by one.
ZEROGPU = """
import inspect, multiprocessing, pickle
from queue import Empty

context = multiprocessing.get_context("fork")
def _work(function, packed, results):
    args, kwargs = pickle.loads(packed)
    try:
        found = function(*args, **kwargs)
        for one in found if inspect.isgeneratorfunction(function) else [found]:
            results.put((True, pickle.dumps(one)))
    except Exception as error:
        results.put((True, pickle.dumps(error)))
    results.put((False, None))

def _lend(function, args, kwargs):
    packed, results = pickle.dumps((args, kwargs)), context.Queue()
    process = context.Process(target=_work, args=(function, packed, results), daemon=True)
    process.start()
    while (one := results.get())[0]:
        value = pickle.loads(one[1])
        if isinstance(value, Exception):
            raise value
        yield value
    process.join()

def GPU(function):
    if inspect.isgeneratorfunction(function):
        return lambda *args, **kwargs: _lend(function, args, kwargs)
    return lambda *args, **kwargs: next(_lend(function, args, kwargs))
"""
LENT = """
import sys, threading
from msae_space.generation import stream
from msae_space.library import Key, Library
from msae_space.links import View
from msae_space.meaning import Meaning
from msae_space.reading import read, read_levels
from msae_space.strengths import Dial
from msae_space.tab_compare import draw_parts
from msae_space.tab_steer import run
import spaces

source, meta = sys.argv[1:]
bench = Library((source,)).open(Key(source))
view = View(bench.key, prompt="One day", dials=(Dial(7, 1.5),), max_new_tokens=12)
drawn = list(run(bench, view, "a"))
assert len(drawn) > 4 and "nats per token" in drawn[-1] and 'data-state="done"' in drawn[-1], drawn[-1]
halted = []
for one in run(bench, View(bench.key, prompt="One day", max_new_tokens=60), "b"):
    halted.append(one)
    from msae_space.tab_steer import RUNS
    if len(halted) == 3:
        RUNS.stop("b")
assert len(halted) < 20 and 'data-state="done"' in halted[-1]
meaning = Meaning(bench)
meaning.wait()
assert meaning.progress == "" and meaning.mean_norm > 0
assert any("owl" in hit.why for hit in meaning.search("owl"))
assert "meta-latents" in draw_parts(bench, meaning, meta, 5)
assert read(bench, "A little owl.").active and len(read_levels(bench, "A little owl.")[1]) == 3
print("lent", drawn[-1])
"""


def test_everything_works_in_the_processes_that_zerogpu_forks(tmp_path, bench, story_sae):
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    train_meta_sae(bench.sae, num_latents=64, k=3, max_steps=10, random_control=False).sae.save_pretrained(
        tmp_path / "meta"
    )
    (tmp_path / "spaces.py").write_text(ZEROGPU)
    path = os.pathsep.join([str(tmp_path), str(space_folder())])
    ran = subprocess.run(
        [sys.executable, "-c", LENT, str(story_sae), str(tmp_path / "meta")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    view = View(bench.key, prompt="One day", dials=(Dial(7, 1.5),), max_new_tokens=12)
    expected = texts(bench, Steering(edits(bench, view.dials, view.method)), seed=0, tokens=12, prompt=view.prompt)
    assert drawing.text(expected.steered) in ran.stdout


# The commands


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_space_push_publishes_the_page_in_one_commit(hub, story_sae, capsys):
    MatryoshkaSAE.from_pretrained(story_sae).push_to_hub("tester/owls")
    assert run("space", "push", "tester/page", "--sae", "tester/owls", "--title", "Owls") == 0
    assert "tester/page" in capsys.readouterr().out
    files = hub.files("tester/page", kind="space")
    here = {path.relative_to(space_folder()).as_posix() for path in space_folder().rglob("*") if path.is_file()}
    here = {path for path in here if "cache" not in path}
    assert {path for path in files if not path.startswith("hf_msae/")} - {".gitattributes"} == here | {"space.json"}
    assert yaml.safe_load(files["space.json"]) == {"saes": ["tester/owls"], "meta_sae": None, "title": "Owls"}
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["title"] == "Owls"
    assert front["sdk"] == "gradio"
    assert front["models"] == ["tester/owls"]
    commits = HfApi().list_repo_commits("tester/page", repo_type="space")
    assert len(commits) == 2  # the empty repo, and everything


def test_a_pushed_space_runs_the_package_that_it_carries(tmp_path, story_sae):
    """As on the Hub: its folder is where Python looks first."""
    shutil.copytree(space_folder(), tmp_path / "space")
    copy_package(tmp_path / "space" / "hf_msae")
    assert not (tmp_path / "space" / "hf_msae" / "space").exists()
    (tmp_path / "space" / "space.json").write_text(json.dumps({"saes": [str(story_sae)]}))
    code = (
        "import hf_msae, hf_msae.modeling, hf_msae.worlds.stories as stories\n"
        "from msae_space.library import Key, Library\n"
        "from msae_space.settings import read_settings\n"
        "key = Key(read_settings().saes[0])\n"
        "bench = Library((key.source,)).open(key)\n"
        "print(hf_msae.__file__, hf_msae.modeling.__file__, stories.__file__, bench.site)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MSAE_SPACE")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "space",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    *places, site = ran.stdout.split()
    assert all(Path(place).is_relative_to(tmp_path / "space" / "hf_msae") for place in places), places
    assert site == "model.layers.2:output"


def test_space_push_refuses_what_a_space_could_not_show(hub, story_sae, capsys, monkeypatch):
    for arguments, words in (
        (["push", "tester/page", "--sae", str(story_sae)], "a Space cannot read"),
        (["push", "--sae", "tester/owls"], "needs the Space's name"),
        (["push", "tester/page"], "Give the SAE to show"),
        (["push", "tester/page", "--sae", "tester/nothing"], "no Hub repo tester/nothing"),
        (["run", "x", "--sae", "tester/owls"], "takes no repo"),
    ):
        assert run("space", *arguments) == 2
        assert words in capsys.readouterr().err
    local = MatryoshkaSAE.from_pretrained(story_sae)
    local.push_to_hub("tester/owls")
    local.config.base_model = "/home/me/lm"
    local.push_to_hub("tester/private")
    assert run("space", "push", "tester/page", "--sae", "tester/private") == 2
    assert "language model '/home/me/lm'" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert run("space", "push", "tester/page", "--sae", "tester/owls") == 2
    assert "refused the Space" in capsys.readouterr().err
    assert ("space", "tester/page") not in hub.repos


def test_requirements_are_those_of_the_package_as_it_is_tested():
    lines = (space_folder() / "requirements.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    tested = dict(
        line.strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.match(r"\w.*==", line)
    )
    assert pinned == {name: tested[name] for name in pinned}
    assert {"torch", "transformers", "huggingface-hub"} <= set(pinned)
    # What the package needs and neither these nor Gradio bring.
    wanted = re.search(r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    brought = {"numpy", "pyyaml"}
    assert {re.split("[>=]", name)[0] for name in re.findall(r'"([^"]+)"', wanted)} - brought == {
        re.split("[>=]", line)[0] for line in lines
    }


def test_the_readme_names_the_gradio_that_is_tested():
    gradio = pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    front = yaml.safe_load((space_folder() / "README.md").read_text().split("---")[1])
    assert front["sdk_version"] == gradio.__version__
    assert front["app_file"] == "app.py"
    assert (space_folder() / "app.py").is_file()
    assert len(front["short_description"]) <= 60  # the Hub refuses more
    assert math.isclose(float(front["python_version"]), 3.11)
