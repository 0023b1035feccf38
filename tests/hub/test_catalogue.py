"""What SAEs the Hub holds for a language model: found by tags and names, outlined without weights, and loadable."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, find_saes
from hf_msae.cli.find_saes import describe_repo
from hf_msae.cli.main import main
from hf_msae.hub import FoundSAE, NoSAEError

pytestmark = pytest.mark.slow

LM = "owner/lm-1b"
RELEASE = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
D, F = 6, 24


def card(**metadata) -> bytes:
    return f"---\n{json.dumps(metadata)}\n---\n".encode()


def put_model(hub, repo: str, **metadata) -> None:
    hub.put(repo, {"config.json": b'{"model_type": "llama"}', "README.md": card(**metadata)})


def push_ours(repo: str, subfolder: str = "", **changes) -> MatryoshkaSAE:
    torch.manual_seed(0)
    shape = {"hidden_size": D, "num_latents": F, "prefix_sizes": [4, 12, F], "k": 3, "base_model": LM}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | {"site": "model.layers.3:output"} | changes))).eval()
    sae.push_to_hub(repo, subfolder=subfolder or None)
    return sae


def saelens(hook: str, model: str, num_latents: int = F, **metadata) -> dict[str, bytes]:
    """The inference form; without `training_architecture_details` it does not say at which sizes it is nested."""
    metadata = {"sae_lens_version": "6.5.0", "model_name": model, "hook_name": hook, **metadata}
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": num_latents, "dtype": "float32", "metadata": metadata}
    shapes = {"W_enc": (D, num_latents), "W_dec": (num_latents, D), "b_enc": (num_latents,), "b_dec": (D,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()} | {"threshold": torch.ones(num_latents)}
    return {"cfg.json": json.dumps(config).encode(), "sae_weights.safetensors": save(tensors)}


def put_saelens(hub, repo: str, folders: dict[str, dict[str, bytes]], **metadata) -> None:
    files = {f"{folder}/{name}": data for folder, files in folders.items() for name, data in files.items()}
    hub.put(repo, {**files, "README.md": card(**metadata)})


MATRYOSHKA = {"training_architecture": "matryoshka_batchtopk"}
RECORDED = {**MATRYOSHKA, "training_architecture_details": {"matryoshka_widths": [8, F]}}


def run(arguments: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(arguments))
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_ours_and_others_are_found_outlined_and_load_by_the_command_that_is_told(hub, tmp_path, monkeypatch, capsys):
    put_model(hub, LM)
    push_ours("tester/grid", "layers.3", site="model.layers.3:output")
    push_ours("tester/grid", "layers.4", site="model.layers.4.mlp:input", site_out="model.layers.4.mlp:output")
    push_ours("tester/grid", "another", base_model="owner/lm-2b")
    push_ours("tester/single")
    # By its tags, and by its name alone: no tag says which language model it is of.
    put_saelens(
        hub,
        "lens/tagged",
        {
            f"blocks.{layer}.hook_resid_post": saelens(f"blocks.{layer}.hook_resid_post", LM, **RECORDED)
            for layer in (0, 1)
        },
        library_name="saelens",
        base_model=LM,
    )
    unsaid = saelens("blocks.2.hook_resid_post", "lm-1b", **MATRYOSHKA)
    put_saelens(hub, "lens/some-lm-1b-things", {"deep/l2": unsaid}, library_name="saelens")
    hub.page_size = 2

    found = find_saes(LM)
    weights = [r for r in hub.asked("safetensors") if r.method == "GET" and "/resolve/" in r.path]
    sent = [
        request.path for request in weights if request.path.startswith("/tester") or request.path.startswith("/lens")
    ]
    by_place = {(sae.repo, sae.subfolder): sae for sae in found}
    assert list(by_place) == [
        ("tester/grid", "layers.3"),
        ("tester/grid", "layers.4"),
        ("tester/single", ""),
        ("lens/tagged", "blocks.0.hook_resid_post"),
        ("lens/tagged", "blocks.1.hook_resid_post"),
        ("lens/some-lm-1b-things", "deep/l2"),
    ]
    assert sent == []
    transcoder = by_place["tester/grid", "layers.4"]
    assert (transcoder.library, transcoder.site, transcoder.site_out, transcoder.prefix_sizes, transcoder.loads) == (
        *("hf_msae", "model.layers.4.mlp:input", "model.layers.4.mlp:output", [4, 12, F], True),
    )
    told = by_place["lens/tagged", "blocks.1.hook_resid_post"]
    assert (told.library, told.base_model, told.site, told.num_latents, told.prefix_sizes, told.loads) == (
        *("SAELens", LM, "layers.1", F, [8, F], True),
    )
    asks = by_place["lens/some-lm-1b-things", "deep/l2"]
    assert (asks.loads, asks.prefix_sizes, asks.num_latents, asks.site) == (False, None, F, "layers.2")
    assert "Give prefix_sizes" in asks.note

    monkeypatch.chdir(tmp_path)
    for sae in found:
        names = {"MatryoshkaSAE": MatryoshkaSAE}
        if not sae.loads:
            with pytest.raises(ValueError, match="Give prefix_sizes"):
                eval(sae.load, names)
            continue
        config = eval(sae.load, names).config
        said = (config.base_model, config.site, config.site_out, config.num_latents, config.prefix_sizes)
        assert said == (sae.base_model, sae.site, sae.site_out, sae.num_latents, sae.prefix_sizes)
        code, _, error = run(sae.command.removeprefix("hf-msae "), capsys)
        assert code == 0, error
        fetched = MatryoshkaSAE.from_pretrained(_only_folder_of(tmp_path, sae)).config
        assert (fetched.site, fetched.prefix_sizes) == (sae.site, sae.prefix_sizes)


def _only_folder_of(place: Path, sae: FoundSAE) -> Path:
    folder = shlex.split(sae.command)[3]
    (config,) = (place / folder).rglob("config.json")
    return config.parent


def test_a_known_release_is_found_by_its_name_with_its_nesting(hub):
    put_model(hub, "google/gemma-2-2b")
    folders = {
        f"snap/blocks.{i}.hook_resid_post": saelens(f"blocks.{i}.hook_resid_post", "gemma-2-2b", 32768) for i in (0, 7)
    }
    put_saelens(hub, RELEASE, folders, library_name="saelens")
    found = find_saes("google/gemma-2-2b")
    assert [(sae.site, sae.prefix_sizes, sae.loads) for sae in found] == [
        (f"layers.{layer}", [128, 512, 2048, 8192, 32768], True) for layer in (0, 7)
    ]
    assert eval(found[1].load, {"MatryoshkaSAE": MatryoshkaSAE}).config.prefix_sizes == found[1].prefix_sizes


def test_releases_that_are_named_after_their_model_need_no_file(hub):
    put_model(hub, "google/gemma-2-2b")
    put_model(hub, "Qwen/Qwen3-1.7B-Base")
    scope = "google/gemma-scope-2b-pt-res"
    hub.put(scope, {f"layer_{i}/width_16k/average_l0_{i + 50}/params.npz": b"0" for i in range(26)})
    hub.put("google/gemma-scope-2b-it-res", {"layer_3/width_16k/average_l0_50/params.npz": b"0"})
    qwen = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    hub.put(qwen, {f"layer{i}.sae.pt": b"0" for i in range(3)})
    hub.requests.clear()
    found = find_saes("google/gemma-2-2b")
    assert [(sae.repo, sae.site) for sae in found] == [(scope, f"layers.{i}:output") for i in range(26)]
    assert found[9].command == (
        f"hf-msae convert {scope} saes/gemma-scope-2b-pt-res/layer_9/width_16k/average_l0_59 "
        "--subfolder layer_9/width_16k/average_l0_59"
    )
    layers = find_saes("Qwen/Qwen3-1.7B-Base")
    assert [(sae.subfolder, sae.site, sae.num_latents) for sae in layers] == [
        (f"layer{i}.sae.pt", f"layers.{i}:output", 32768) for i in range(3)
    ]
    assert hub.asked("params.npz|sae.pt") == []


def test_other_models_saes_are_left_out(hub):
    put_model(hub, LM)
    it, tagged = (
        saelens("blocks.0.hook_resid_post", "owner/lm-1b-it"),
        saelens("blocks.0.hook_resid_post", "other/lm-3b"),
    )
    put_saelens(hub, "lens/lm-1b-it-saes", {"a": it}, tags=["saelens"])
    put_saelens(hub, "lens/lm-1b-more", {"a": tagged}, tags=["saelens"], base_model=LM)
    # Nothing says of which model they are but their names.
    unsaid = saelens("blocks.0.hook_resid_post", None)
    put_saelens(hub, "lens/lm-1b-unsaid", {"a": unsaid}, tags=["saelens"])
    put_saelens(hub, "lens/lm-1b-it-unsaid", {"a": unsaid}, tags=["saelens"])
    put_saelens(hub, "lens/olm-1b-unsaid", {"a": unsaid}, tags=["saelens"])
    put_model(hub, "owner/tuned", base_model=LM, tags=["sae"])
    assert [sae.repo for sae in find_saes(LM)] == ["lens/lm-1b-unsaid"]


def test_what_strangers_wrote_stops_nothing(hub, caplog):
    put_model(hub, LM)
    push_ours("tester/good")
    ours = {"tags": ["sae"], "base_model": LM}
    hub.put("bad/index", {"sae_index.json": b"{]", "README.md": card(**ours)})
    hub.put(
        "bad/lens",
        {
            "a/cfg.json": b'{"d_sae": "x", "metadata": [1]}',
            "a/sae_weights.safetensors": b"",
            "README.md": card(**ours),
        },
    )
    hub.put(
        "bad/dl",
        {
            "t/ae.pt": b"",
            "t/config.json": b'{"trainer": {"layer": [1], "submodule_name": 3}}',
            "README.md": card(**ours),
        },
    )
    hub.put("bad/gated", {"t/ae.pt": b"", "t/config.json": b"{}", "README.md": card(**ours)})
    hub.repo("bad/gated").gated = True
    hub.put("bad/empty", {"README.md": card(**ours)})
    found = {sae.repo: sae for sae in find_saes(LM)}
    assert list(found) == ["tester/good", "bad/dl", "bad/lens"]
    assert "configuration is not as SAELens writes it" in found["bad/lens"].note
    assert "bad/gated was not looked into" in caplog.text
    assert "bad/index was not looked into" in caplog.text


def test_private_repos_are_for_their_owner(hub):
    put_model(hub, LM)
    push_ours("tester/hidden")
    HfApi().update_repo_settings("tester/hidden", private=True)
    assert [sae.repo for sae in find_saes(LM)] == ["tester/hidden"]
    assert find_saes(LM, token=False) == []


def test_no_more_repos_than_wanted(hub):
    put_model(hub, LM)
    for number in range(5):
        push_ours(f"tester/s{number}")
    assert len(find_saes(LM, max_repos=3)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/absent", "There is no model owner/absent on the Hub that you may see; give the id of one"),
        ("a/b/c", "There is no model a/b/c on the Hub"),
        ("stories", "'stories' is in the package and not on the Hub"),
    ],
)
def test_a_model_that_is_not_there(hub, name, message, capsys):
    with pytest.raises(NoSAEError, match=message):
        find_saes(name)
    code, out, error = run(f"find-saes {name}", capsys)
    assert (code, out) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_out_of_reach(hub, capsys):
    put_model(hub, LM)
    hub.stop()
    code, out, error = run(f"find-saes {LM}", capsys)
    assert (code, out) == (2, "")
    assert "The Hub cannot be asked which SAEs there are of owner/lm-1b" in error


def test_the_command(hub, capsys):
    put_model(hub, LM)
    code, out, _ = run(f"find-saes {LM}", capsys)
    assert (code, out) == (0, f"No SAE of {LM} was found on the Hub; `hf-msae train --model {LM}` trains one.\n")
    assert json.loads(run(f"find-saes {LM} --json", capsys)[1]) == {"base_model": LM, "saes": []}
    for layer in (3, 4, 5, 9):
        push_ours("tester/grid", f"l{layer}", site=f"model.layers.{layer}:output")
    code, out, _ = run(f"find-saes {LM}", capsys)
    assert (code, out.splitlines()) == (
        0,
        [
            "tester/grid: 4 SAEs",
            "  hf_msae: model.layers.3,4,5,9:output; 24 latents, nested at 4, 12, 24",
            "    hf-msae pull tester/grid saes/grid/l3 --subfolder l3",
        ],
    )
    listed = json.loads(run(f"find-saes {LM} --json", capsys)[1])["saes"]
    assert listed == [sae.to_dict() for sae in find_saes(LM)]
    assert run("find-saes x --max-repos 0", capsys)[0] == 2


def test_a_repo_in_lines():
    def found(
        site: str | None, sizes: list[int] | None, note: str | None = None, site_out: str | None = None
    ) -> FoundSAE:
        width = sizes[-1] if sizes else None
        return FoundSAE("o/r", "f", "SAELens", "m", site, site_out, width, sizes, note is None, "", "hf-msae x", note)

    saes = [found(f"layers.{layer}", [16]) for layer in range(3)]
    saes += [found(None, None, "Give prefix_sizes."), found("layers.1.mlp:input", [4, 16], site_out="layers.1.mlp")]
    assert describe_repo("o/r", saes) == [
        "o/r: 5 SAEs",
        "  SAELens: layers.0–2; 16 latents, one level",
        "    hf-msae x",
        "  SAELens: an unrecorded site; an unrecorded width, nesting not recorded",
        "    does not load as it stands: Give prefix_sizes.",
        "  SAELens: layers.1.mlp:input → layers.1.mlp; 16 latents, nested at 4, 16",
        "    hf-msae x",
    ]
