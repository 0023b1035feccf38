"""A checkpoint is written by others: what is wrong in it is said in a sentence, before it costs anything."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hf_msae.modeling.ranged_files import FIRST_READ, MAX_HEADER, read_spans
from hf_msae.modeling.untrusted import DTYPES, PER_LATENT, inside, parse_json, read_json
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

pytestmark = pytest.mark.slow

REPO = "tester/sae"
LATENTS, HIDDEN = 32, 8
REFUSED = (ValueError, StrictDataclassError, OSError)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=HIDDEN, num_latents=LATENTS, prefix_sizes=[8, LATENTS], k=4))
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | changes
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


# Names


@pytest.mark.parametrize("name", ["", "a", "layers.12/16k", "a/./b", "a//b/", "..a", "a..b", "-rf"])
def test_names_below_a_folder_stay_below_it(name: str, tmp_path: Path):
    assert (tmp_path / inside(name)).resolve().is_relative_to(tmp_path)


OUTSIDE = ["..", "../x", "a/../../x", "a/..", "/etc", "//host/x", "C:/x", "c:x", "a\\..\\x", "a\0b", "a\nb", "\x1b[2J"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(name: str):
    with pytest.raises(ValueError, match="must be a path below"):
        inside(name)


@given(st.text(st.sampled_from("ab./\\:~\0 "), max_size=12))
@settings(max_examples=300, deadline=None)
def test_no_name_leads_outside(tmp_path_factory, name: str):
    folder = Path("/somewhere/deep")
    try:
        found = inside(name)
    except ValueError:
        return
    assert os.path.normpath(folder / found).startswith(str(folder))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["disk", "hub"])
def test_no_sae_is_read_beside_the_folder_that_was_named(hub, folder: Path, name: str, place: str):
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    (folder / "below").mkdir()
    source = folder / "below" if place == "disk" else REPO
    hub.requests.clear()
    for prefix in (None, 8):
        with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
            MatryoshkaSAE.from_pretrained(source, subfolder=name, prefix=prefix)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "x.bin",
        "",
        "-x.safetensors",
        ".x.safetensors",
        "a\\x.safetensors",
        3,
    ],
)
@pytest.mark.parametrize("prefix", [None, 8])
def test_an_index_names_files_beside_it_and_nothing_else(folder: Path, name, prefix: int | None):
    """What it names is there, so that only its name can be the reason."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if isinstance(name, str) and name and not name.startswith("/"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    weight_map = dict.fromkeys((*PER_LATENT, "b_dec"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="names other files than safetensors beside it"):
        MatryoshkaSAE.from_pretrained(folder, prefix=prefix)
    weight_map = dict.fromkeys(weight_map, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00001-of-00001.safetensors").write_bytes(content)
    assert MatryoshkaSAE.from_pretrained(folder, prefix=prefix).config.hidden_size == HIDDEN


# JSON


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, b"\xff\xfe\x00", b"\x00" * 9, '{"a": 1}}'])
def test_json_that_cannot_be_read_is_a_value_error(text: str | bytes):
    with pytest.raises(ValueError, match=r"^there is no JSON that can be read"):
        parse_json(text, "there")


def test_a_json_file_larger_than_any_is_not_read(tmp_path: Path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes"):
        read_json(path)


# Configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_9"},
        {"_attn_implementation": "flash_attention_9", "_attn_implementation_internal": "flash_attention_9"},
        {"experts_implementation": "nonsense", "_name_or_path": "/etc"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"num_labels": 10**12},
        {"id2label": {"x": 1}, "label2id": {}},
        {"per_layer_config": {"0": {"hidden_size": 3}}},
        {"output_attentions": True, "problem_type": "regression"},
    ],
)
def test_what_means_nothing_for_an_sae_is_left_out(folder: Path, changes: dict):
    expected = MatryoshkaSAE.from_pretrained(folder)
    edit_config(folder, **changes)
    loaded = [MatryoshkaSAE.from_pretrained(folder), AutoModel.from_pretrained(folder)]
    for sae in loaded:
        assert torch.equal(sae.W_dec, expected.W_dec)
        assert len(sae.config.id2label) == 2


HUGE = [10**12, 2**63, 10**400]
NONSENSE = [
    *(
        {name: value}
        for name in ("hidden_size", "num_latents", "context_length")
        for value in [*HUGE, -1, 0, "x", 1.5]
    ),
    *({"prefix_sizes": value} for value in ([], [0], [-1, LATENTS], [8], "ab", {"a": 1}, [[8]], [8, "x"], 3) if value),
    *({"dtype": value} for value in ("load", "nonsense", "int8", "float8_e4m3fn", 3, {}, "os.system")),
    {"torch_dtype": "load"},
    *({"k": value} for value in (-1, 0, float("nan"), float("inf"), "x", LATENTS + 1)),
    {"measured": {"l0": "x", "fve": []}},
    {"measured": {"l0": [1, 2], "fve": [[1], 2]}},
    {"measured": {"l0": [1], "fve": [1, 2]}},
    {"measured": {"deep": {"a": {}}}},
    {"measured": {"tokens": "many"}},
    {"level_weights": [float("nan"), 1.0]},
    {"balance": float("inf")},
    {"transformers_weights": "../x.bin"},
]


@pytest.mark.parametrize("changes", NONSENSE, ids=lambda changes: str(changes)[:40])
def test_a_configuration_of_nonsense_is_refused_without_room_for_it(folder: Path, changes: dict):
    edit_config(folder, **changes)
    tracemalloc.start()
    for load in (MatryoshkaSAE.from_pretrained, AutoModel.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(REFUSED):
            load(folder)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_many_levels_are_refused_before_they_are_looked_at(folder: Path):
    sizes = list(range(1, 100_001))
    edit_config(folder, num_latents=100_000, prefix_sizes=sizes)
    for load in (MatryoshkaSAE.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="at most 1,024 levels, got 100,000") as error:
            load(folder)
        assert len(str(error.value)) < 300
    with pytest.raises(REFUSED, match="at most 1,024 levels, got 2,000"):
        MatryoshkaSAEConfig(num_latents=2000, prefix_sizes=sizes[:2000])


@pytest.mark.parametrize("prefix", [None, 8])
@pytest.mark.parametrize("num_latents", [2**23, 2**31 - 1])
def test_no_room_is_made_for_latents_that_the_file_lacks(
    folder: Path, num_latents: int, prefix: int | None, monkeypatch: pytest.MonkeyPatch
):
    edit_config(folder, num_latents=num_latents, prefix_sizes=[8, num_latents])
    before = torch.empty
    asked: list[int] = []

    def counted(*size, **options):
        made = before(*size, **options)
        asked.append(made.nbytes if made.device.type != "meta" else 0)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    with pytest.raises(ValueError, match="mismatched_keys"):
        MatryoshkaSAE.from_pretrained(folder, prefix=prefix)
    assert sum(asked) < 1e6


# Weights


@pytest.mark.parametrize("prefix", [None, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*PER_LATENT, "b_dec"])
def test_numbers_that_are_none_are_refused(folder: Path, name: str, value: float, prefix: int | None):
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    edit_weights(folder, **{name: tensor})
    with pytest.raises(ValueError, match=f"{name} in .* holds NaN or infinite numbers"):
        MatryoshkaSAE.from_pretrained(folder, prefix=prefix)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("threshold", -0.1, "threshold .* goes from -0.1 to 0, but must be from 0"),
        ("max_activation", -3.0, "max_activation .* goes from -3 to 0, but must be from 0"),
        ("firing_rate", -0.5, "firing_rate .* but must be from 0 to 1"),
        ("firing_rate", 1.5, "firing_rate .* but must be from 0 to 1"),
    ],
)
def test_thresholds_maxima_and_rates_are_what_they_can_be(folder: Path, name: str, value: float, said: str):
    tensor = torch.zeros(LATENTS)
    tensor[5] = value
    edit_weights(folder, **{name: tensor})
    with pytest.raises(ValueError, match=said):
        MatryoshkaSAE.from_pretrained(folder)
    assert MatryoshkaSAE.from_pretrained(folder, prefix=5).config.num_latents == 5  # only what is read is looked at
    state = load_file(folder / "model.safetensors")
    config = MatryoshkaSAEConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=said):
        MatryoshkaSAE.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("prefix", [None, 8])
def test_whole_numbers_are_no_weights(folder: Path, dtype: torch.dtype, prefix: int | None):
    edit_weights(folder, W_dec=torch.ones(LATENTS, HIDDEN).to(dtype))
    with pytest.raises(ValueError, match=f"W_dec in .* is {str(dtype)[6:]}; an SAE's numbers are float32"):
        MatryoshkaSAE.from_pretrained(folder, prefix=prefix)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_of_an_sae_is_read(folder: Path, dtype: torch.dtype):
    edit_weights(folder, W_dec=torch.ones(LATENTS, HIDDEN, dtype=dtype))
    assert MatryoshkaSAE.from_pretrained(folder, dtype=dtype).W_dec.dtype == dtype


def test_a_pickle_is_not_read(folder: Path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for load in (MatryoshkaSAE.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
            load(folder)


# Headers


def with_header(header: dict, data: int) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(data)


def overlapping(repeats: int, data: int) -> bytes:
    """Every row tensor is all of the data."""
    return with_header(
        {f"W_{n}": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]} for n in range(repeats)}, data
    )


HEADERS = {
    "overlap": overlapping(50, 4000),
    "same twice": overlapping(2, 100),
    "hole": with_header({"W_dec": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, 16),
    "size": with_header({"W_dec": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, 16),
    "negative": with_header({"W_dec": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, 16),
    "fraction": with_header({"W_dec": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, 16),
    "huge": with_header({"W_dec": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, 16),
    "dtype": with_header({"W_dec": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}}, 16),
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "long": (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
    "text": with_header({"W_dec": "x"}, 16),
    "strangers": with_header(
        {f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(5000)}, 5000
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_is_believed_only_where_its_tensors_are_the_file(folder: Path, kind: str):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(HEADERS[kind])
    for prefix in (None, 8):
        with pytest.raises(ValueError, match=r"not a complete safetensors file|not those of a MatryoshkaSAE") as error:
            MatryoshkaSAE.from_pretrained(folder, prefix=prefix)
        assert len(str(error.value)) < 1500


@pytest.mark.parametrize("kind", HEADERS)
def test_no_more_is_asked_for_than_the_file(hub, folder: Path, kind: str):
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    hub.put(REPO, {"model.safetensors": HEADERS[kind]})
    hub.requests.clear()
    with pytest.raises(ValueError, match=r"model\.safetensors of tester/sae"):
        MatryoshkaSAE.from_pretrained(REPO, prefix=8)
    downloads = "GET .*(/large/|safetensors)"
    assert hub.bytes_sent(downloads) <= len(HEADERS[kind]) + FIRST_READ
    assert len(hub.asked("")) < 12


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_places_are_the_file_each_byte_once(data):
    """Whatever a header says: refused, or a partition of the bytes behind it."""
    size = data.draw(st.integers(0, 64))
    number = st.integers(-4, 70)
    entries = data.draw(
        st.dictionaries(
            st.sampled_from([*PER_LATENT, "b_dec"]),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "U8", "F64", "X"]),
                    "shape": st.lists(st.integers(-1, 9), max_size=2),
                    "data_offsets": st.tuples(number, number),
                }
            ),
            max_size=3,
        )
    )
    content = with_header(entries, size)
    try:
        places = read_spans(lambda start, stop: content[start:stop], len(content), "file")
    except ValueError:
        return
    start = len(content) - size
    for place in places:
        assert place.start == start
        start = place.stop
    assert start == len(content)


@pytest.mark.parametrize("pattern", ["GET .*/resolve/.*safetensors", "GET /large"])
def test_redirects_that_never_end_are_followed_once(hub, folder: Path, pattern: str):
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    hub.fail(pattern, times=10_000, location="")
    with pytest.raises(Exception, match=r"[Rr]edirect"):
        MatryoshkaSAE.from_pretrained(REPO, prefix=8)
    assert len(hub.requests) < 40
