"""What the Space knows of latents, what it offers first, and how that is drawn."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msae_space import drawing
from msae_space.dials import draw_dials
from msae_space.latent_index import READING, LatentIndex
from msae_space.loaded_sae import Key, SpaceError, own_modules
from msae_space.presets import Preset, by_promotion, published
from msae_space.reading import activations, check_prompt, encode_text, read
from msae_space.strengths import Condition, Dial, edits
from msae_space.trials import MIN_MOVED, _kept, find_trials

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub.spaces import space_folder
from hf_msae.research.meta import decompose, train_meta_sae
from hf_msae.steering import Gate, LatentEdit, PrefixEdit, Steering, save_steering

pytestmark = pytest.mark.slow

TEXT = "Once upon a time, there was a little owl. She lived in the forest with her mother."
EVIL = '<img src=x onerror="alert(1)">${alert(2)}`{{value}}'


# LatentIndex


def test_names_and_pages_come_from_the_interpretation(loaded, index):
    page = index.page(5)
    assert page is not None
    assert page.latent == 5
    assert index.name(5) == page.name
    with pytest.raises(SpaceError, match="latents 0 to 255"):
        index.page(256)


def test_search_begins_with_latents_that_promote_the_word(loaded, index):
    hits = index.search("owl")
    assert [hit.promotes for hit in hits] == sorted((hit.promotes for hit in hits), reverse=True)
    effects = {
        page.latent: max(one.effect for one in page.promoted if one.token.strip() == "owl") * page_maximum
        for page in (index.page(hit.latent) for hit in hits if hit.promotes)
        for page_maximum in [loaded.sae.max_activation[page.latent].item()]
    }
    assert list(effects.values()) == sorted(effects.values(), reverse=True)
    for hit in hits:
        if hit.promotes:
            assert hit.why == f"“owl” {effects[hit.latent]:+.1f}"


def test_search_finds_latents_that_fire_on_a_word(loaded, index):
    hits = index.search("owl")
    place = next(place for place, piece in enumerate(read(loaded, TEXT).pieces) if piece.strip() == "owl")
    firing = {latent for latent, _ in read(loaded, TEXT).active[place]}
    assert hits
    assert any("owl" in hit.why for hit in hits)
    assert {hit.latent for hit in hits if "“owl”" in hit.why} & firing
    assert [hit.latent for hit in index.search("#12")] == [12]


@pytest.mark.parametrize(("words", "problem"), [("256", "0 to 255"), (" ", "Type a word"), ("...", "no words")])
def test_searches_that_cannot_be_made(index, words, problem):
    with pytest.raises(SpaceError, match=problem):
        index.search(words)


def test_own_modules_share_weights_and_no_hooks(loaded):
    twin = own_modules(loaded.model)
    assert all(a is b for a, b in zip(twin.parameters(), loaded.model.parameters(), strict=True))
    handle = twin.get_submodule(loaded.site.path).register_forward_hook(lambda *_: pytest.fail("the twin's hook ran"))
    activations(loaded, encode_text(loaded, TEXT))
    handle.remove()


def test_without_an_interpretation_only_numbers_are_found(loaded, tmp_path):
    loaded.sae.save_pretrained(tmp_path / "bare")
    config = MatryoshkaSAEConfig.from_pretrained(tmp_path / "bare")
    config.base_model = "somebody/lm"
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "bare", config=config).eval()
    bare = LatentIndex(replace(loaded, sae=sae, key=Key(str(tmp_path / "bare"))))
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


def test_a_latent_is_taken_apart(loaded, index, tmp_path):
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    from msae_space.tab_compare import draw_parts

    meta = train_meta_sae(loaded.sae, num_latents=64, k=3, max_steps=30, random_control=False).sae.eval()
    meta.save_pretrained(tmp_path / "meta")
    (expected,) = decompose(meta, loaded.sae, [5])
    drawn = draw_parts(loaded, index, str(tmp_path / "meta"), 5)
    assert f"{len(expected.parts)} meta-latents" in drawn
    assert f"cosine of {expected.cosine:.2f}" in drawn
    for part in expected.parts:
        assert f"Meta-latent {part.meta_latent}, weight {part.activation:.2f}" in drawn
        assert all(f'data-id="{other}"' in drawn for other, _ in part.shared_with)
    other = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[64], k=4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SpaceError, match="16 dimensions"):
        draw_parts(loaded, index, str(tmp_path / "other"), 5)


# Presets


def test_tried_presets_do_what_they_say(loaded, index):
    """Recomputed here: the named words are likelier, by as much as is said."""
    presets = index.presets()
    assert presets
    for preset in presets[:3]:
        said = [int(number) / 100 for number in re.findall(r"(\d+)%", preset.why)]
        ids = loaded.tokenizer(preset.prompt, return_tensors="pt").input_ids
        words = [
            loaded.tokenizer(f" {word}", add_special_tokens=False).input_ids[-1] for word in preset.name.split(", ")
        ]
        found = []
        for steering in (Steering(edits(loaded, preset.dials, preset.method)), Steering()):
            with torch.no_grad(), steering.on(loaded.model, loaded.sae, loaded.special_ids):
                logits = loaded.model(input_ids=ids).logits[0, -1]
            found.append(logits.softmax(-1)[words].sum().item())
        assert found == pytest.approx(said, abs=0.006)
        assert found[0] - found[1] >= MIN_MOVED
    names = [word for preset in presets for word in preset.name.split(", ")]
    assert len(set(names)) == len(names), "two presets promise the same"


def test_presets_are_kept_for_the_next_start(loaded, index):
    runs: list[int] = []
    again = LatentIndex(loaded)
    handle = again._model.register_forward_pre_hook(lambda *_: runs.append(1))
    again.wait()
    handle.remove()
    assert again.presets() == index.presets()
    assert not runs, "they were tried out again"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5), inside, max_size=4),
    max_leaves=8,
)
KEPT = {"name": "owl", "dials": [[3, 1.5]], "method": "add", "prompt": "A", "seed": 0, "why": ""}
DAMAGED = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"[[]]", b"3", b"null", b'[{"dials": 3}]', b"9" * 5000]


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({name: st.just(value) | JSON for name, value in KEPT.items()}))
def test_presets_of_a_damaged_file_can_be_shown_or_are_found_anew(loaded, index, tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "presets.json"
    path.write_text(json.dumps([values]))
    for preset in _kept(loaded, path) or []:
        assert draw_dials(loaded, index, preset.dials, preset.method)["dials"]
        assert drawing.button(preset.name, "take", preset.dials[0].latent)
        assert edits(loaded, preset.dials, preset.method)
        check_prompt(loaded, preset.prompt or "A", 1)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_that_holds_no_presets_is_as_good_as_none(loaded, tmp_path, content):
    (tmp_path / "presets.json").write_bytes(content)
    assert _kept(loaded, tmp_path / "presets.json") is None


def test_places_are_where_the_text_is_open(loaded, index):
    places = find_trials(loaded, index._model, range(32))
    assert [place.moved for place in places] == sorted((place.moved for place in places), reverse=True)
    for place in places[:3]:
        ids = loaded.tokenizer(place.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            clean = loaded.model(input_ids=ids).logits[0, -1].softmax(-1)
        assert clean[list(place.tokens)].min() > 0.003, "a word that was out of order"
        assert not place.prompt.endswith((".", "!", "?"))


def test_presets_by_promotion_share_no_word(loaded, index):
    presets = by_promotion(loaded, index._found)
    words = [word for preset in presets for word in preset.name.split(", ")]
    assert len(words) == len(set(words)) == 3 * len(presets)
    for preset in presets:
        promoted = [one.token.strip() for one in index.page(preset.dials[0].latent).promoted]
        assert set(preset.name.split(", ")) <= set(promoted)


def test_published_steerings_are_the_presets(loaded, tmp_path):
    loaded.sae.save_pretrained(tmp_path)
    maximum = loaded.sae.max_activation[3].item()
    absolute = 2.0 / loaded.maxima[7]
    for steering in (
        Steering([LatentEdit(3, 1.5), LatentEdit(40, -1.0)], name="two", description="of them"),
        Steering([LatentEdit(3, 2 * maximum, units="absolute")], name="absolute"),
        Steering([LatentEdit(3, 1.0), LatentEdit(4, method="ablate")], name="two methods"),
        Steering([PrefixEdit(0)], name="a prefix"),
        Steering([LatentEdit(3, 1.5, when=[Gate(9, above=0.5), Gate(7, 2.0, "absolute", "after")])], name="gated"),
        Steering([LatentEdit(3, 1.5, when=Gate(9)), LatentEdit(4, 1.5)], name="two gates"),
        Steering([LatentEdit(3, 1.5, when=Gate(999))], name="no such gate"),
        Steering([LatentEdit(999, 1.0)], name="no such latent"),
    ):
        save_steering(steering, tmp_path)
    found = published(replace(loaded, key=Key(str(tmp_path))))
    assert found == [
        Preset("two", (Dial(3, 1.5), Dial(40, -1.0)), why="of them"),
        Preset("absolute", (Dial(3, pytest.approx(2.0)),)),
        Preset(
            "gated", (Dial(3, 1.5),), conditions=(Condition(9, 0.5), Condition(7, pytest.approx(absolute), "after"))
        ),
    ]
    assert published(loaded) == []


# Drawing


def test_whatever_is_drawn_is_escaped(loaded, index):
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
