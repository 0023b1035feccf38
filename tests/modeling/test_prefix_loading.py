"""Reading a prefix: it equals the truncated whole, and over the network costs only its own bytes."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling import prefix_loading as loading
from hf_msae.modeling import ranged_files as ranged
from hf_msae.modeling.untrusted import PER_LATENT, weight_shapes
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

REPO = "tester/sae"
LATENTS, HIDDEN = 512, 32
# What a checkpoint costs besides rows: its b_dec, and the first reading of the header.
SMALL = ranged.FIRST_READ + 4 * HIDDEN + 1
DOWNLOADS = "GET .*(/large/|safetensors)"


def make_sae(dtype: torch.dtype = torch.float32, seed: int = 0, num_latents: int = LATENTS) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(
        hidden_size=HIDDEN, num_latents=num_latents, prefix_sizes=[16, 64, 256, num_latents], k=8, dtype=dtype
    )
    sae = MatryoshkaSAE(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for tensor in (sae.threshold, sae.max_activation, sae.firing_rate):
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    # `threshold` and the statistics stay in float32, whatever the weights are.
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(sae, name).data = getattr(sae, name).data.to(dtype)
    return sae.eval()


def push(sae: MatryoshkaSAE, folder: Path, subfolder: str = "", **how) -> str:
    sae.save_pretrained(folder, **how)
    HfApi().create_repo(REPO, exist_ok=True)
    return HfApi().upload_folder(repo_id=REPO, folder_path=folder, path_in_repo=subfolder).oid


def row_bytes(sae: MatryoshkaSAE, prefix: int) -> int:
    state = sae.state_dict()
    return sum(state[name][0].nbytes * prefix for name in PER_LATENT)


def gap_bytes(sae: MatryoshkaSAE, prefix: int) -> int:
    """What is read at most of the other latents' numbers, so that all is read by few requests."""
    return 2 * 4 * (sae.config.num_latents - prefix)


def assert_same(loaded: MatryoshkaSAE, expected: MatryoshkaSAE) -> None:
    assert loaded.config.prefix_sizes == expected.config.prefix_sizes
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.encode(x), expected.encode(x))


def kept_files() -> list[str]:
    folder = Path(constants.HF_HUB_CACHE) / "hf_msae--prefixes"
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def sae() -> MatryoshkaSAE:
    return make_sae()


@pytest.fixture
def pushed(hub, sae: MatryoshkaSAE, tmp_path: Path) -> str:
    """The commit of a repo that holds `sae`; nothing was asked since."""
    commit = push(sae, tmp_path / "saved")
    hub.requests.clear()
    return commit


class TestEqualsTheTruncatedWhole:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shard", ["50GB", "50KB"])
    @pytest.mark.parametrize("place", ["disk", "hub", "subfolder"])
    def test_any_storage(self, hub, tmp_path: Path, dtype: torch.dtype, shard: str, place: str):
        sae = make_sae(dtype)
        subfolder = "layer_3/wide" if place == "subfolder" else ""
        push(sae, tmp_path, subfolder, max_shard_size=shard)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
        source = tmp_path if place == "disk" else REPO
        for prefix in (1, 16, 100, 511, LATENTS):
            loaded = MatryoshkaSAE.from_pretrained(source, prefix=prefix, subfolder=subfolder)
            assert_same(loaded, sae.truncate(prefix))

    @pytest.mark.parametrize("chunk", [7000, 1 << 40])
    def test_pieces_of_any_size(self, pushed: str, sae: MatryoshkaSAE, monkeypatch, chunk: int):
        monkeypatch.setattr(ranged, "CHUNK", chunk)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=256), sae.truncate(256))

    @given(
        prefix=st.integers(1, 64), num_latents=st.integers(1, 64), hidden=st.integers(1, 9), seed=st.integers(0, 99)
    )
    @settings(max_examples=25, deadline=None)
    def test_ranges_give_what_slices_give(
        self, tmp_path_factory, prefix: int, num_latents: int, hidden: int, seed: int
    ):
        """Whatever the shapes, and where in the file each tensor lies."""
        folder = tmp_path_factory.mktemp("rows")
        generator = torch.Generator().manual_seed(seed)
        prefix = min(prefix, num_latents)
        config = MatryoshkaSAEConfig(hidden_size=hidden, num_latents=num_latents, k=1)
        state = {
            name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(num_latents, hidden).items()
        }
        save_file(state, folder / "model.safetensors")
        content = (folder / "model.safetensors").read_bytes()
        places = ranged.read_spans(lambda start, stop: content[start:stop], len(content), "file")
        for place in places:
            part = loading._first_rows(place, prefix)
            rows = torch.frombuffer(bytearray(content[part.start : part.stop]), dtype=torch.float32).view(part.shape)
            assert torch.equal(rows, loading.truncate_state(state, prefix)[place.name])
        read = loading.read_state(folder, config, prefix)
        assert all(torch.equal(read[name], loading.truncate_state(state, prefix)[name]) for name in state)

    def test_revisions(self, hub, pushed: str, sae: MatryoshkaSAE, tmp_path: Path):
        other = make_sae(seed=1)
        push(other, tmp_path / "other")
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), other.truncate(64))
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64, revision=pushed), sae.truncate(64))
        HfApi().create_branch(REPO, branch="old", revision=pushed)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64, revision="old"), sae.truncate(64))

    def test_pull_request(self, hub, pushed: str, tmp_path: Path):
        other = make_sae(seed=1)
        other.save_pretrained(tmp_path / "other")
        HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "other", create_pr=True)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64, revision="refs/pr/1"), other.truncate(64))


class TestBytes:
    @pytest.mark.parametrize("prefix", [1, 16, 256])
    @pytest.mark.parametrize("cdn", [True, False])
    def test_only_the_rows_travel(self, hub, pushed: str, sae: MatryoshkaSAE, prefix: int, cdn: bool):
        hub.cdn = cdn
        MatryoshkaSAE.from_pretrained(REPO, prefix=prefix)
        sent = hub.bytes_sent(DOWNLOADS)
        assert row_bytes(sae, prefix) <= sent <= row_bytes(sae, prefix) + SMALL + gap_bytes(sae, prefix)
        whole = len(hub.files(REPO)["model.safetensors"])
        assert prefix == 256 or sent < whole / 10

    @pytest.mark.parametrize("subfolder", ["", "layers.3/16k"])
    @pytest.mark.parametrize("cdn", [True, False])
    @pytest.mark.parametrize("prefix", [1, 16, 256, 511])
    def test_at_most_eight_requests(self, hub, tmp_path: Path, subfolder: str, cdn: bool, prefix: int):
        hub.cdn = cdn
        push(make_sae(num_latents=4096), tmp_path, subfolder)
        hub.requests.clear()
        loaded = MatryoshkaSAE.from_pretrained(REPO, prefix=prefix, subfolder=subfolder)
        assert_same(loaded, make_sae(num_latents=4096).truncate(prefix))
        assert len(hub.requests) <= 8
        assert len({request.path for request in hub.asked("GET .*config.json")}) == 1
        hub.requests.clear()
        MatryoshkaSAE.from_pretrained(REPO, prefix=prefix, subfolder=subfolder)
        assert [request.method for request in hub.requests] == ["HEAD"]  # whether the branch has moved

    @given(
        sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
        most=st.integers(1, 5),
    )
    def test_ranges_hold_all_spans_and_fill_the_smallest_gaps(self, sizes: list[tuple[int, int]], most: int):
        spans, end = [], 0
        for gap, size in sizes:
            spans.append(ranged.TensorSpan("x", "U8", (size,), end + gap, end := end + gap + size))
        ranges = ranged.merge_ranges(spans, most)
        assert len(ranges) <= most
        wanted = {byte for span in spans for byte in range(span.start, span.stop)}
        read = {byte for start, stop in ranges for byte in range(start, stop)}
        assert wanted <= read
        holes = [right[0] - left[1] for left, right in pairwise(ranges)]
        full = [span for span in spans if span.size]
        gaps = sorted((right.start - left.stop for left, right in pairwise(full)), reverse=True)
        # What is not read are the largest gaps, as many as there may be.
        assert sorted(holes, reverse=True) == [gap for gap in gaps[: most - 1] if gap]

    def test_shards_too(self, hub, tmp_path: Path, sae: MatryoshkaSAE):
        push(sae, tmp_path, max_shard_size="50KB")
        hub.requests.clear()
        MatryoshkaSAE.from_pretrained(REPO, prefix=16)
        shards = len(list(tmp_path.glob("*.safetensors")))
        index = (tmp_path / "model.safetensors.index.json").stat().st_size
        assert hub.bytes_sent(DOWNLOADS) <= row_bytes(sae, 16) + shards * SMALL + index + 200

    def test_what_was_saved_is_said(self, hub, pushed: str, sae: MatryoshkaSAE, caplog: pytest.LogCaptureFixture):
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        mega = row_bytes(sae, 64) + 4 * HIDDEN, len(hub.files(REPO)["model.safetensors"])
        wanted = f"Read {mega[0] / 1e6:.1f} MB of the {mega[1] / 1e6:.1f} MB of model.safetensors of {REPO}: "
        assert [record.message for record in caplog.records] == [f"{wanted}the first 64 of 512 latents."]
        caplog.clear()
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert not caplog.records

    def test_the_token_stays_with_the_hub(self, hub, sae: MatryoshkaSAE, tmp_path: Path):
        HfApi().create_repo(REPO, private=True)
        push(sae, tmp_path)
        hub.requests.clear()
        MatryoshkaSAE.from_pretrained(REPO, prefix=16, token=hub.read_token)
        assert {request.token for request in hub.asked("/resolve/.*safetensors")} == {hub.read_token}
        assert {request.token for request in hub.asked("/large/")} == {None}
        with pytest.raises(OSError, match="private repository"):
            MatryoshkaSAE.from_pretrained(REPO, prefix=32, token=hub.stranger_token, cache_dir=tmp_path / "empty")


class TestCache:
    def test_second_load_transfers_nothing(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        hub.requests.clear()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        assert hub.asked(DOWNLOADS) == []

    def test_a_larger_prefix_serves(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO, prefix=256)
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert [name for name in kept_files() if name.startswith("first")] == ["first-256.safetensors"]
        hub.requests.clear()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=16), sae.truncate(16))
        assert hub.asked(DOWNLOADS) == []
        MatryoshkaSAE.from_pretrained(REPO, prefix=257)
        assert hub.bytes_sent(DOWNLOADS) >= row_bytes(sae, 257)

    def test_the_whole_file_serves(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO)
        hub.requests.clear()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        assert (hub.asked("safetensors"), kept_files()) == ([], [])

    def test_all_rows_are_the_whole_file(self, hub, pushed: str, sae: MatryoshkaSAE):
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=LATENTS), sae)
        assert kept_files() == []
        hub.requests.clear()
        MatryoshkaSAE.from_pretrained(REPO)
        assert hub.bytes_sent(DOWNLOADS) == 0

    def test_a_commit_that_leaves_the_weights_alone(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"# Better", path_in_repo="README.md")
        hub.requests.clear()
        for prefix in (64, 16):
            assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=prefix), sae.truncate(prefix))
        assert hub.bytes_sent(DOWNLOADS) == ranged.FIRST_READ  # the question what the file is

    @pytest.mark.parametrize("shard", ["50GB", "50KB"])
    def test_offline(self, hub, sae: MatryoshkaSAE, tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch):
        push(sae, tmp_path, max_shard_size=shard)
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        hub.stop()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=16, local_files_only=True), sae.truncate(16))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        with pytest.raises(FileNotFoundError, match=r"first 65 latents .* are not on this machine"):
            MatryoshkaSAE.from_pretrained(REPO, prefix=65)

    def test_out_of_reach_but_not_told_so(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        hub.stop()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))

    def test_force_download(self, hub, pushed: str, sae: MatryoshkaSAE):
        MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        (kept,) = Path(constants.HF_HUB_CACHE).glob("hf_msae--prefixes/*/*/first-64.safetensors")
        kept.write_bytes(kept.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"first-64\.safetensors is not a complete .* force_download=True"):
            MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64, force_download=True), sae.truncate(64))
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))

    def test_cache_dir(self, hub, pushed: str, sae: MatryoshkaSAE, tmp_path: Path):
        cache = tmp_path / "cache"
        MatryoshkaSAE.from_pretrained(REPO, prefix=64, cache_dir=cache)
        assert len(list(cache.glob("hf_msae--prefixes/tester--sae/*/first-64.safetensors"))) == 1
        assert kept_files() == []


class TestFailures:
    def test_an_interruption_costs_its_piece_alone(self, hub, tmp_path: Path):
        """Pieces are of 10 MB, so this one needs a larger SAE: two pieces for each of W_dec and W_enc."""
        config = MatryoshkaSAEConfig(hidden_size=1024, num_latents=3200, prefix_sizes=[2900, 3200], k=8)
        sae = MatryoshkaSAE(config).eval()
        push(sae, tmp_path)
        hub.requests.clear()
        # The question what the file is, then the first piece: the second breaks off.
        hub.fail("GET /large", skip=2, drop_after=1_000_000)
        loaded = MatryoshkaSAE.from_pretrained(REPO, prefix=2900)
        assert torch.equal(loaded.W_dec, sae.W_dec[:2900])
        assert torch.equal(loaded.W_enc, sae.W_enc[:2900])
        asked = [request.range for request in hub.asked("GET /large")]
        assert (asked[2], len(asked)) == (asked[3], len(set(asked)) + 1)
        surplus = hub.bytes_sent(DOWNLOADS) - row_bytes(sae, 2900)
        assert 1_000_000 <= surplus <= 1_000_000 + ranged.FIRST_READ + 4 * 1024 + gap_bytes(sae, 2900)

    @pytest.mark.parametrize("where", ["/resolve/.*safetensors", "/large/"])
    @pytest.mark.parametrize("status", [503, 429])
    def test_busy(self, hub, pushed: str, sae: MatryoshkaSAE, where: str, status: int):
        fault = hub.fail(f"GET .*{where}", status=status)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        assert fault.times == 0

    def test_a_failure_for_good_leaves_nothing(self, hub, pushed: str, sae: MatryoshkaSAE):
        hub.fail("GET /large", skip=3, times=99, status=403)
        with pytest.raises(HfHubHTTPError, match="403"):
            MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert kept_files() == []
        hub.faults.clear()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_an_address_that_holds_no_longer_is_asked_for_anew(
        self, hub, pushed: str, sae: MatryoshkaSAE, status: int
    ):
        """A storage's addresses are signed for a while."""
        fault = hub.fail("GET /large", skip=2, status=status)
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        assert fault.times == 0

    def test_a_server_without_ranges(self, hub, pushed: str, sae: MatryoshkaSAE, caplog: pytest.LogCaptureFixture):
        hub.ranges = False
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=64), sae.truncate(64))
        assert (
            caplog.records[0].message == f"The server of {REPO} sends whole files only: downloading model.safetensors."
        )
        hub.requests.clear()
        assert_same(MatryoshkaSAE.from_pretrained(REPO, prefix=16), sae.truncate(16))
        assert hub.bytes_sent(DOWNLOADS) == 0

    def test_a_server_that_stops_honouring_ranges(self, hub, pushed: str):
        hub.cdn = False
        hub.fail("GET .*safetensors", skip=1, ranges=False)
        with pytest.raises(OSError, match=r"Asked for bytes \d+-\d+/\d+ of model\.safetensors .* sent status 200"):
            MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert kept_files() == []


def cut(content: bytes) -> bytes:
    return content[:-100]


def lengthen(content: bytes) -> bytes:
    return content + b"more"


def announce_too_much(content: bytes) -> bytes:
    return struct.pack("<Q", 1 << 40) + content[8:]


def scramble_header(content: bytes) -> bytes:
    return content[:8] + b"?" + content[9:]


def misstate_shape(content: bytes) -> bytes:
    return content.replace(b'"shape":[32]', b'"shape":[31]')


def pickle_instead(content: bytes) -> bytes:
    return b"\x80\x02}q\x00."


def nothing(content: bytes) -> bytes:
    return b""


DAMAGES = [
    (cut, r"its header describes [\d,]+ bytes, and it has [\d,]+"),
    (lengthen, r"its header describes [\d,]+ bytes, and it has [\d,]+"),
    (announce_too_much, "announce a header up to byte 1,099,511,627,784"),
    (scramble_header, "its header cannot be read"),
    (misstate_shape, "not a complete safetensors file"),
    (pickle_instead, "fewer than the 8"),
    (nothing, "it has 0 bytes|it is empty"),
]


class TestDamage:
    @pytest.mark.parametrize(("damage", "message"), DAMAGES)
    def test_on_disk(self, tmp_path: Path, sae: MatryoshkaSAE, damage, message: str):
        sae.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        damaged = damage(file.read_bytes())
        file.unlink()
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            MatryoshkaSAE.from_pretrained(tmp_path, prefix=64)
        assert str(file) in str(error.value)

    @pytest.mark.parametrize(("damage", "message"), DAMAGES)
    def test_on_the_hub(self, hub, pushed: str, damage, message: str):
        hub.put(REPO, {"model.safetensors": damage(hub.files(REPO)["model.safetensors"])})
        with pytest.raises(ValueError, match=message) as error:
            MatryoshkaSAE.from_pretrained(REPO, prefix=64)
        assert f"model.safetensors of {REPO}" in str(error.value)
        assert kept_files() == []

    @pytest.mark.parametrize("place", ["disk", "hub"])
    def test_fewer_rows_than_the_configuration_says(self, hub, tmp_path: Path, place: str):
        make_sae(num_latents=300).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"num_latents": 512, "prefix_sizes": [16, 64, 256, 512]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        HfApi().create_repo(REPO)
        HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path)
        source = tmp_path if place == "disk" else REPO
        for prefix in (64, 400, None):
            with pytest.raises(ValueError, match=r"mismatched_keys: .*'W_dec', \(300, 32\), \(512, 32\)"):
                MatryoshkaSAE.from_pretrained(source, prefix=prefix)

    @pytest.mark.parametrize("place", ["disk", "hub"])
    def test_no_weights(self, hub, pushed: str, tmp_path: Path, place: str):
        HfApi().delete_file("model.safetensors", REPO)
        (tmp_path / "saved" / "model.safetensors").unlink()
        source = tmp_path / "saved" if place == "disk" else REPO
        with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
            MatryoshkaSAE.from_pretrained(source, prefix=64)

    @pytest.mark.parametrize("place", ["disk", "hub"])
    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("[]", "no index of safetensors files"),
            ("{", "no index of safetensors files"),
            (
                '{"weight_map": {"W_enc": "../../elsewhere.safetensors"}}',
                "names other files than safetensors beside it",
            ),
        ],
    )
    def test_damaged_index(self, hub, sae: MatryoshkaSAE, tmp_path: Path, index: str, message: str, place: str):
        sae.save_pretrained(tmp_path, max_shard_size="50KB")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        HfApi().create_repo(REPO)
        HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path)
        with pytest.raises(ValueError, match=message):
            MatryoshkaSAE.from_pretrained(tmp_path if place == "disk" else REPO, prefix=64)

    def test_absent_shard(self, sae: MatryoshkaSAE, tmp_path: Path):
        sae.save_pretrained(tmp_path, max_shard_size="50KB")
        shard = next(tmp_path.glob("model-00001*"))
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=shard.name):
            MatryoshkaSAE.from_pretrained(tmp_path, prefix=64)
