"""The Space without a browser: what it reads, writes and links to."""

import contextlib
import io
import threading
from dataclasses import replace
from urllib.parse import parse_qs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msae_space import tab_explore
from msae_space.dials import added, draw_dials, draw_under, draw_with, read_conditions, read_dials
from msae_space.generation import Runs, stream
from msae_space.links import View, as_python, read_query
from msae_space.loaded_sae import Key, Language, LoadedSAE, SpaceError
from msae_space.reading import MAX_TOKENS, Reading, activations, continuation_loss, encode_text, read, read_levels
from msae_space.strengths import (
    FLUENT_SHARE,
    MAX_CONDITIONS,
    MAX_DIALS,
    Condition,
    Dial,
    edits,
    fluent_up_to,
    limit,
    starting_value,
)

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.outliers import within_limit
from hf_msae.sites import capture
from hf_msae.steering import Gate, LatentEdit, SteeredPipeline, Steering

pytestmark = pytest.mark.slow

TEXT = "Once upon a time, there was a little owl. She lived in the forest with her mother."
PROMPT = "Once upon a time, there was a"
EVIL = '<img src=x onerror="alert(1)">${alert(2)}`{{value}}'


def texts(
    loaded: LoadedSAE, steering: Steering, *, seed: int = 0, tokens: int = 20, stopped=None, prompt: str = PROMPT
):
    """The last of a stream."""
    *_, last = stream(
        loaded,
        prompt,
        steering,
        seed=seed,
        temperature=0.7,
        max_new_tokens=tokens,
        stopped=stopped or threading.Event(),
    )
    return last


# Reading


def reading_of(loaded: LoadedSAE, active: list[list[tuple[int, float]]]) -> Reading:
    """A text of as many tokens, with these latents active."""
    rows = tuple(tuple(row) for row in active)
    return Reading(loaded.key, tuple(f" w{number}" for number in range(len(rows))), (False,) * len(rows), rows)


def test_reading_is_what_the_sae_encodes(loaded):
    found = read(loaded, TEXT)
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    expected = loaded.sae.encode(capture(loaded.model, [loaded.site], input_ids=ids)[loaded.site][0])
    assert "".join(found.pieces) == loaded.tokenizer.decode(ids[0])
    assert found.skipped == (True, *[False] * (ids.shape[1] - 1))
    assert found.active[0] == ()
    for row, active in zip(expected[1:], found.active[1:], strict=True):
        assert {latent for latent, _ in active} == set(row.nonzero().flatten().tolist())
        assert [value for _, value in active] == sorted((value for value in row[row > 0].tolist()), reverse=True)
    strongest = found.active[5][0]
    assert found.values(strongest[0])[5] == strongest[1]


class Names:
    """An index in which some latents are named by function words."""

    def __init__(self, *dull: int) -> None:
        self.dull = dull

    def name(self, latent: int) -> str:
        return "of, the" if latent in self.dull else "owl, of"


def test_the_most_telling_latent_is_strong_and_rare(loaded, index):
    names = Names()
    assert tab_explore.most_telling(loaded, names, reading_of(loaded, [[]])) is None
    by_rate = sorted(range(len(loaded.maxima)), key=lambda latent: loaded.firing_rates[latent])
    alive = [latent for latent in by_rate if loaded.maxima[latent] > 0 and 0 < loaded.firing_rates[latent] < 0.9]
    rare, common, silent = alive[0], alive[-1], [one for one in by_rate if loaded.maxima[one] == 0]
    strong = [(latent, loaded.maxima[latent]) for latent in (common, rare)]
    assert tab_explore.most_telling(loaded, names, reading_of(loaded, [strong[:1], strong[1:]])) == rare
    weak = [(rare, 0.001 * loaded.maxima[rare])]
    half = [(common, 0.5 * loaded.maxima[common])]
    assert tab_explore.most_telling(loaded, names, reading_of(loaded, [weak, half])) == common
    assert tab_explore.most_telling(loaded, Names(common), reading_of(loaded, [weak, half])) == rare
    # A maximum that is not known tells nothing.
    assert all(
        tab_explore.most_telling(loaded, names, reading_of(loaded, [[(one, 9.0)], weak])) == rare for one in silent[:3]
    )
    text, _ = tab_explore.draw_reading(loaded, index, reading_of(loaded, [half, []]), None, None, "levels")
    assert f'title="level {loaded.level_of(common)}: #{common} ' in text
    assert text.count("--a:0.500") == text.count("--a:0.000") == 1


def test_outliers_are_shown_without_latents_and_left_out_of_the_variance(loaded):
    """Attention sinks, beyond the norm that the SAE's configuration names, are no part of what it was trained on."""
    x, _ = activations(loaded, encode_text(loaded, TEXT))
    norms = x.norm(dim=-1)
    limit_of_norm = norms[1:].median().item()
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**loaded.sae.config.to_dict(), "norm_limit": limit_of_norm})).eval()
    sae.load_state_dict(loaded.sae.state_dict())
    limited, plain = replace(loaded, sae=sae), read(loaded, TEXT)
    found = read(limited, TEXT)
    inlying = norms <= limit_of_norm
    inlying[0] = False
    assert 2 < int(inlying.sum()) < len(norms) - 1
    assert found.pieces == plain.pieces
    assert found.skipped == tuple((~inlying).tolist())
    for kept, active, before in zip(inlying.tolist(), found.active, plain.active, strict=True):
        assert active == (before if kept else ())
    kept = x[inlying]
    with torch.no_grad():
        latents = sae.encode(kept)
        error = [(kept - sae.decode(latents, size)).pow(2).sum() for size in loaded.prefix_sizes]
    expected = [1 - (one / (kept - kept.mean(0)).pow(2).sum()).item() for one in error]
    assert [level.fve for level in read_levels(limited, TEXT)[1]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("share_of_outliers", [0.0, 0.3])
def test_levels_agree_with_the_packages_own_measurement(loaded, share_of_outliers):
    """Outliers are left as they are by both."""
    if share_of_outliers:
        norms = activations(loaded, encode_text(loaded, TEXT))[0][1:].norm(dim=-1)
        limit_of_norm = norms.quantile(1 - share_of_outliers).item()
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**loaded.sae.config.to_dict(), "norm_limit": limit_of_norm})).eval()
        sae.load_state_dict(loaded.sae.state_dict())
        loaded = replace(loaded, sae=sae)
    pieces, levels = read_levels(loaded, TEXT)
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[0, 0] = False
    batch = {"input_ids": ids, "attention_mask": None, "keep": keep}
    mean, norm_limit = torch.zeros(128), loaded.sae.config.norm_limit
    measured = measure_cross_entropy(loaded.model, loaded.site, loaded.sae, mean, [batch], norm_limit)
    x = capture(loaded.model, [loaded.site], input_ids=ids)[loaded.site]
    kept = (keep & within_limit(x, norm_limit))[0]
    counted = kept[:-1] & kept[1:]
    assert counted.sum() == (len(kept) - 2 if norm_limit is None else measured.ce_tokens) > 4
    assert len(pieces) == ids.shape[1]
    assert [level.prefix for level in levels] == [32, 128, 256]
    for level, other in zip(levels, measured.levels, strict=True):
        # BOS is left as it is, and so predicted alike.
        assert level.kl[0] == pytest.approx(0, abs=1e-6)
        assert torch.tensor(level.kl[:-1])[counted].mean().item() == pytest.approx(other.kl, rel=1e-4)
        assert level.ce - level.ce_clean == pytest.approx(other.ce_increase, rel=1e-3)
    x = x[0, kept]
    error = (x - loaded.sae.decode(loaded.sae.encode(x), 32)).square().sum()
    assert levels[0].fve == pytest.approx(1 - (error / (x - x.mean(0)).square().sum()).item(), abs=1e-5)
    assert 0 < levels[0].fve < levels[-1].fve < 1


def test_what_is_read_is_not_disturbed_by_others(loaded):
    """Many read at once, and somebody else steers meanwhile: everybody gets what they would get alone."""
    expected = activations(loaded, encode_text(loaded, TEXT))[0]
    other_text = "Lily went to the garden. " * 5
    other = activations(loaded, encode_text(loaded, other_text))[0]
    problems: list[str] = []
    stopped = threading.Event()

    def read_often(text: str, wanted: torch.Tensor) -> None:
        for _ in range(20):
            if not torch.equal(activations(loaded, encode_text(loaded, text))[0], wanted):
                problems.append(text)

    def steer_on() -> None:
        texts(loaded, Steering([LatentEdit(3, 2.0)]), tokens=60, stopped=stopped)

    threads = [threading.Thread(target=read_often, args=pair) for pair in ((TEXT, expected), (other_text, other))]
    threads.append(threading.Thread(target=steer_on))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(
    ("text", "words"), [("  ", "is empty"), ("owl " * MAX_TOKENS, f"reads up to {MAX_TOKENS}")], ids=["empty", "long"]
)
def test_texts_that_cannot_be_read(loaded, text, words):
    with pytest.raises(SpaceError, match=words):
        read(loaded, text)


def test_surprise_is_the_loss_of_the_continuation(loaded):
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    before = len(loaded.tokenizer(PROMPT).input_ids)
    labels = ids.clone()
    labels[:, :before] = -100
    with torch.no_grad():
        expected = loaded.model(input_ids=ids, labels=labels).loss.item()
    assert continuation_loss(loaded, PROMPT, TEXT.removeprefix(PROMPT)) == pytest.approx(expected, rel=1e-4)
    assert continuation_loss(loaded, PROMPT, "") is None


# Generation


def test_no_strength_writes_the_default_text(loaded):
    found = texts(loaded, Steering([LatentEdit(3, 0.0)]))
    assert found.done
    assert found.steered == found.default != ""


def test_text_streams_and_is_that_of_the_pipeline(loaded):
    steering = Steering([LatentEdit(3, 1.5), LatentEdit(40, -1.0)])
    grown = list(
        stream(loaded, PROMPT, steering, seed=4, temperature=0.7, max_new_tokens=20, stopped=threading.Event())
    )
    lengths = [len(found.steered) for found in grown]
    assert len(set(lengths)) > 5
    assert lengths == sorted(lengths)
    for name, what in (("steered", steering), ("default", Steering())):
        pipe = SteeredPipeline(loaded.model, loaded.tokenizer, loaded.sae, what)
        answer = pipe(PROMPT, seed=4, temperature=0.7, max_new_tokens=20)[0]["generated_text"]
        assert PROMPT + getattr(grown[-1], name) == answer
    assert grown[-1].steered != grown[-1].default


def test_the_first_new_word_keeps_its_space(loaded, lm, tokenizer):
    """Many tokenizers drop the space before the first token that they decode, and transformers' pipeline with them."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[32], k=4, site="layers.0"))
    other = replace(loaded, key=Key("w"), sae=sae.eval(), language=Language.of(lm, tokenizer))
    *_, last = stream(other, "w1 w2 w3", Steering(), seed=0, temperature=0.7, max_new_tokens=8)
    pipe = SteeredPipeline(lm, tokenizer, sae, Steering())
    answer = pipe("w1 w2 w3", seed=0, temperature=0.7, max_new_tokens=8)[0]["generated_text"]
    assert last.default == f" {answer.removeprefix('w1 w2 w3')}"


def test_streams_at_once_do_not_mix(loaded):
    wishes = [Steering([LatentEdit(latent, 2.0)]) for latent in (1, 5, 9)]
    alone = [texts(loaded, wish, seed=seed) for seed, wish in enumerate(wishes)]
    found: dict[int, object] = {}

    def write(seed: int) -> None:
        found[seed] = texts(loaded, wishes[seed], seed=seed)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(3)] == alone


def test_stopping_ends_both_texts_early(loaded):
    stopped = threading.Event()
    for found in stream(loaded, PROMPT, Steering(), seed=0, temperature=0.7, max_new_tokens=200, stopped=stopped):
        last = found
        if len(found.default) > 20:
            stopped.set()
    whole = texts(loaded, Steering(), tokens=200)
    assert last.done
    assert len(last.default) < len(whole.default) / 2
    assert whole.default.startswith(last.default)


def test_leaving_the_stream_ends_its_threads(loaded):
    before, stopped = threading.active_count(), threading.Event()
    running = stream(loaded, PROMPT, Steering(), seed=0, temperature=0.7, max_new_tokens=200, stopped=stopped)
    next(running)
    assert threading.active_count() > before
    running.close()
    assert threading.active_count() == before
    assert stopped.is_set()


def test_what_goes_wrong_in_a_thread_is_raised(loaded):
    with pytest.raises(ValueError, match="latent 999 is not there"):
        texts(loaded, Steering([LatentEdit(999, 1.0)]))


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


def test_the_band_is_a_share_of_the_activations_length(loaded, index):
    x, _ = activations(loaded, encode_text(loaded, TEXT))
    assert loaded.mean_norm == pytest.approx(x[1:].norm(dim=-1).mean().item(), rel=0.15)
    norm, sae = loaded.mean_norm, loaded.sae
    for latent in range(20):
        shift = fluent_up_to(loaded, latent) * (sae.max_activation[latent] * sae.W_dec[latent]).norm().item()
        assert shift == pytest.approx(FLUENT_SHARE * norm)
        assert 0 < starting_value(loaded, latent) < fluent_up_to(loaded, latent) + 0.05
        assert starting_value(loaded, latent) < limit(loaded, latent)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"dials": [{"latent": 256, "value": 1}]}, "latents 0 to 255"),
        ({"dials": [{"latent": -1, "value": 1}]}, "latents 0 to 255"),
        ({"dials": [{"latent": 1, "value": "nan"}]}, "finite"),
        ({"dials": [{"latent": 1}]}, "must be a finite number"),
        ({"dials": 3}, "unreadable"),
        ([1], "unreadable"),
        ({"dials": [{"latent": one, "value": 1} for one in range(MAX_DIALS + 1)]}, f"Up to {MAX_DIALS}"),
    ],
)
def test_dials_from_a_browser_are_checked(loaded, value, words):
    with pytest.raises(SpaceError, match=words):
        read_dials(value, loaded)


def test_latents_without_a_maximum_are_steered_in_shares_of_the_activation(loaded, index):
    """As those of checkpoints from other libraries, which do not say it."""
    foreign = replace(loaded, maxima=[0.0] * 256)
    assert fluent_up_to(foreign, 3) == FLUENT_SHARE
    assert edits(foreign, [Dial(3, 0.4)], "add") == [LatentEdit(3, 0.4, "add", "norm")]
    assert "× norm" in draw_dials(foreign, index, [Dial(3, 0.4)], "add")["html"]
    code = as_python(foreign, View(foreign.key, prompt=PROMPT, dials=(Dial(3, 0.4),)))
    assert "LatentEdit(3, 0.4, method='add', units='norm')" in code
    # On tokens of mean length, the same shift.
    strong = [fluent_up_to(one, 3) for one in (loaded, foreign)]
    shifts = [
        strong[0] * (loaded.sae.max_activation[3] * loaded.sae.W_dec[3]).norm().item(),
        strong[1] * loaded.mean_norm,
    ]
    assert shifts[0] == pytest.approx(shifts[1])


def test_dials_are_added_changed_and_full():
    dials = [Dial(latent, 1.0) for latent in range(MAX_DIALS)]
    assert added(dials, Dial(2, 0.5))[2] == Dial(2, 0.5)
    assert len(added(dials, Dial(2, 0.5))) == MAX_DIALS
    assert added([], Dial(7, 1.0)) == [Dial(7, 1.0)]
    with pytest.raises(SpaceError, match="remove one first"):
        added(dials, Dial(99, 1.0))


def test_drawn_dials_are_read_back(loaded, index):
    dials = [Dial(3, 0.25), Dial(200, -1.0)]
    drawn = draw_dials(loaded, index, dials, "add")
    assert read_dials(drawn, loaded) == dials
    assert drawn["html"].count('type="range"') == 2
    assert "level 0" in drawn["html"]
    assert "level 2" in drawn["html"]
    assert edits(loaded, dials, "clamp") == [LatentEdit(3, 0.25, "clamp"), LatentEdit(200, -1.0, "clamp")]
    with pytest.raises(SpaceError, match="no method 'shout'"):
        edits(loaded, dials, "shout")


def test_drawn_conditions_are_read_back(loaded, index):
    conditions = [Condition(40, 0.5), Condition(200, 0.0, "after")]
    drawn = draw_dials(loaded, index, [Dial(3, 1.0)], "add", conditions)
    assert read_conditions(drawn, loaded) == conditions
    assert read_dials(drawn, loaded) == [Dial(3, 1.0)]
    assert "Only where all of these fire" in drawn["html"]
    assert drawn["html"].count("<select") == 2
    gates = (Gate(40, above=0.5), Gate(200, then="after"))
    for loaded_from, units in ((loaded, "max"), (replace(loaded, maxima=[0.0] * 256), "absolute")):
        (edit,) = edits(loaded_from, [Dial(3, 1.0)], "add", conditions)
        assert edit.gates == tuple(replace(gate, units=units) for gate in gates)
    # A latent more, whichever kind, leaves the rest as it was.
    more = draw_with(loaded, index, drawn, 9, "add")
    assert read_conditions(more, loaded) == conditions
    under = draw_under(loaded, index, more, 7, "add")
    assert read_dials(under, loaded) == read_dials(more, loaded)
    assert read_conditions(under, loaded) == [*conditions, Condition(7)]
    full = draw_dials(loaded, index, [], "add", [Condition(latent) for latent in range(MAX_CONDITIONS)])
    with pytest.raises(SpaceError, match="remove one first"):
        draw_under(loaded, index, full, 99, "add")


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([{"latent": 256, "above": 0, "then": "here"}], "latents 0 to 255"),
        ([{"latent": 1, "above": -1, "then": "here"}], "A threshold must be"),
        ([{"latent": 1, "above": 0, "then": "never"}], "no place 'never'"),
        ([{"latent": 1}], "A threshold must be"),
        ([3], "unreadable"),
        (
            [{"latent": one, "above": 0, "then": "here"} for one in range(MAX_CONDITIONS + 1)],
            f"Up to {MAX_CONDITIONS}",
        ),
    ],
)
def test_conditions_from_a_browser_are_checked(loaded, conditions, words):
    with pytest.raises(SpaceError, match=words):
        read_conditions({"dials": [], "conditions": conditions}, loaded)


def test_steering_acts_only_where_the_condition_holds(loaded):
    """A latent that fires nowhere in a text leaves it as it is; one that fires at once does not."""
    found = read(loaded, PROMPT)
    firing = {latent for active in found.active for latent, _ in active}
    silent = next(latent for latent in range(256) if latent not in firing and loaded.maxima[latent] > 0)
    strong = found.active[-1][0][0]
    for latent, above, differs in ((strong, 0.0, True), (silent, 1.0, False)):
        gated = Steering(edits(loaded, [Dial(3, 3.0)], "add", [Condition(latent, above)]))
        last = texts(loaded, gated)
        assert (last.steered != last.default) is differs


# Links and code

KEYS = st.builds(Key, st.sampled_from(["owner/name", "/a b/ü?&=#"]), st.sampled_from(["", "layers.2/16k"]))
DIALS = st.lists(
    st.builds(Dial, st.integers(0, 10**6), st.integers(-400, 400).map(lambda value: value / 20)), max_size=4
)
CONDITIONS = st.lists(
    st.builds(
        Condition,
        st.integers(0, 10**6),
        st.integers(0, 20).map(lambda value: value / 20),
        st.sampled_from(["here", "after"]),
    ),
    max_size=4,
)
VIEWS = st.builds(
    View,
    key=KEYS,
    tab=st.sampled_from(["steer", "tree"]),
    prompt=st.text(max_size=50),
    dials=DIALS.map(tuple),
    conditions=CONDITIONS.map(tuple),
    method=st.sampled_from(["add", "clamp", "scale", "ablate"]),
    positions=st.sampled_from(["all", "generated"]),
    temperature=st.integers(0, 30).map(lambda value: value / 20),
    max_new_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**31 - 1),
    text=st.text(max_size=50),
    latent=st.none() | st.integers(0, 10**6),
    level=st.none() | st.integers(0, 9),
)


@settings(max_examples=200, deadline=None)
@given(VIEWS)
def test_a_link_restores_everything(view):
    query = {name: values[0] for name, values in parse_qs(view.query(), keep_blank_values=True).items()}
    found = read_query(query, Key("another/default"))
    assert found == view
    assert found.problems == ()


def test_what_a_link_says_wrongly_is_named_and_left_out():
    query = {
        "latents": "1:x",
        "when": "1:0.5",
        "temperature": "hot",
        "tokens": "9999",
        "method": "shout",
        "seed": "-1",
        "tab": "x",
    }
    found = read_query(query, Key("owner/name"))
    assert found == View(Key("owner/name"))
    assert set(found.problems) == set(query)
    assert read_query({"latents": "1:inf"}, Key("a/b")).problems == ("latents",)
    for wrong in ("1:inf:here", "1:0:never", "1:-1:here", "x:0:here", ",".join(["1:0:here"] * 9)):
        assert read_query({"when": wrong}, Key("a/b")).problems == ("when",)


@pytest.mark.parametrize("conditions", [(), (Condition(7), Condition(40, 0.1, "after"))])
def test_copied_python_prints_the_steered_text(loaded, conditions):
    dials = (Dial(3, 1.5), Dial(40, -1.0))
    view = View(loaded.key, prompt=PROMPT, dials=dials, conditions=conditions, max_new_tokens=15, seed=4)
    code = as_python(loaded, view)
    steering = Steering(edits(loaded, view.dials, view.method, view.conditions))
    expected = PROMPT + texts(loaded, steering, seed=4, tokens=15).steered
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "__main__"})  # it brings all that it needs
    assert printed.getvalue().strip() == expected.strip()


def test_python_of_a_hub_model_loads_it_at_its_revision(loaded):
    config = MatryoshkaSAEConfig(**{**loaded.sae.config.to_dict(), "base_model": "o/lm", "base_model_revision": "abc"})
    sae = MatryoshkaSAE(config)
    code = as_python(replace(loaded, sae=sae, key=Key("me/sae", "l2")), View(Key("me/sae", "l2"), prompt=EVIL))
    compile(code, "code", "exec")
    assert "AutoModelForCausalLM.from_pretrained('o/lm', revision='abc')" in code
    assert "MatryoshkaSAE.from_pretrained('me/sae', subfolder='l2')" in code
    assert repr(EVIL) in code
