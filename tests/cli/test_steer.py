"""`hf-msae steer` as a user types it, on the story model, without a network."""

from pathlib import Path

import pytest

from hf_msae import MatryoshkaSAE
from hf_msae.cli.main import main
from hf_msae.interpret import Interpretation, search_promoting
from hf_msae.steering import Gate, LatentEdit, Steering, save_steering

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"


@pytest.fixture
def folder(untrained: Path) -> Path:
    return untrained


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(("steer", *arguments))
    return int(caught.value.code or 0)


def columns(printed: str) -> tuple[str, str]:
    """The default and the steered text of a printed table."""
    rows = [line.split("│")[1:3] for line in printed.splitlines() if line.startswith("│")]
    left, right = (" ".join(cell.strip() for cell in column if cell.strip()) for column in zip(*rows, strict=True))
    return left, right


def test_both_texts_stand_side_by_side(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "--max-new-tokens", "15")
    assert run(*given, "--latent", "12=4") == 0
    printed = capsys.readouterr().out
    assert "default" in printed
    assert "steered" in printed
    default, steered = columns(printed)
    assert default.startswith(PROMPT)
    assert steered.startswith(PROMPT)
    assert default != steered
    assert run(*given, "--latent", "12=0") == 0
    assert columns(capsys.readouterr().out) == (default, default)
    assert run(*given, "--latent", "12=4", "--seed", "1") == 0
    other = columns(capsys.readouterr().out)
    assert other[0] != default
    assert run(*given, "--latent", "12=40", "--units", "absolute") == 0
    assert columns(capsys.readouterr().out) == (default, steered)


def test_values_levels_and_ablations_go_together_by_method(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "0")
    assert run(*given, "--latent", "12=4", "40=ablate", "--latent", "7=2", "--method", "clamp") == 0
    default, steered = columns(capsys.readouterr().out)
    assert default != steered
    assert run(*given, "--level", "-1") == 0
    assert columns(capsys.readouterr().out) == (default, default)
    assert run(*given, "--latent", "12=4", "--positions", "generated", "--max-new-tokens", "1") == 0
    default, steered = columns(capsys.readouterr().out)
    assert default == steered


def test_gates_say_where_latents_are_steered(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "0")
    for then, flag in (("here", "--when"), ("after", "--when-after")):
        gates = [Gate(5, then=then), Gate(6, 0.001, then=then)]
        save_steering(Steering([LatentEdit(12, 8.0, when=gates)], name=then), folder)
        assert run(*given, "--steering", then) == 0
        by_name = columns(capsys.readouterr().out)
        assert run(*given, "--latent", "12=8", flag, "5", "6=0.001") == 0
        assert columns(capsys.readouterr().out) == by_name
        assert by_name[0] != by_name[1]
        assert run(*given, "--latent", "12=8", flag, "5=1000") == 0
        default, steered = columns(capsys.readouterr().out)
        assert default == steered == by_name[0]


def test_a_saved_steering_is_used_when_nothing_else_is_given(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "A kind boy", "--max-new-tokens", "10")
    assert run(*given) == 2
    assert "nothing to steer: give --latent INDEX=VALUE, --towards WORD or --level N." in capsys.readouterr().err
    save_steering(Steering([LatentEdit(12, 4.0)], name="twelve"), folder)
    save_steering(Steering([LatentEdit(13, 4.0)], name="thirteen"), folder)
    assert run(*given, "--steering", "twelve") == 0
    by_name = capsys.readouterr().out
    assert run(*given, "--latent", "12=4") == 0
    assert capsys.readouterr().out == by_name
    assert run(*given) == 2
    assert "there are 'twelve', 'thirteen'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--latent", "12"), "--latent 12: expected INDEX=VALUE or INDEX=ablate, such as 12=4."),
        (("--latent", "a=4"), "--latent a=4: expected INDEX=VALUE"),
        (("--latent", "64=4"), "latent 64 is not there; it has latents 0 … 63."),
        (("--latent", "1=4", "1=5"), "latent 1 is edited twice"),
        (("--latent", "1=4", "--when", "a"), "--when a: expected INDEX or INDEX=SHARE, such as 40=0.5."),
        (("--latent", "1=4", "--when-after", "5=-1"), "opens above a finite number from 0, got -1.0"),
        (("--latent", "1=4", "--when", "64"), "the gate's latent 64 is not there"),
        (("--level", "0", "--when", "5"), "give --latent or --towards, too"),
        (("--latent", "1=4", "--steering", "x"), "give it, or what to steer, not both"),
        (("--level", "9"), "there is no level 9; the SAE has levels 0 … 4"),
        (("--latent", "1=4", "--model", "./absent"), "There is no model at ./absent"),
        (("--latent", "1=4", "--subfolder", "../x"), "must be a path below the folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, capsys, arguments, said):
    assert run(str(folder), "--prompt", PROMPT, *arguments) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("hf-msae steer: ")]
    assert said in line
    assert "Traceback" not in error


def test_a_name_beside_folders_that_are_there_is_no_hub_repo(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "runs").mkdir()
    for absent in ("runs/absent", "./absent"):
        assert run(absent, "--prompt", PROMPT, "--latent", "1=4") == 2
        assert f"There is no folder {absent}. Give a folder that holds an SAE" in capsys.readouterr().err


@pytest.mark.parametrize("given", [("--sae", "./absent"), ("--sae=./absent",)])
def test_the_flag_of_the_version_before_goes_on_with_a_notice(capsys, given):
    assert run("--prompt", PROMPT, *given, "--latent", "1=4") == 2
    errors = capsys.readouterr().err
    assert "--sae goes with the next version" in errors
    assert "There is no folder ./absent" in errors


def test_a_model_without_a_tokenizer_or_of_another_shape_is_told_in_words(folder, capsys, lm, tokenizer):
    other = folder.parent / "lm"
    lm.save_pretrained(other)
    given = (str(folder), "--prompt", "w1 w2", "--latent", "1=4", "--model", str(other))
    assert run(*given) == 2
    assert f"Cannot load a tokenizer of the model '{other}'" in capsys.readouterr().err
    tokenizer.save_pretrained(other)
    assert run(*given) == 2
    assert "LlamaForCausalLM has 2 layers, so no 'layers.2'" in capsys.readouterr().err
    sae = MatryoshkaSAE.from_pretrained(folder)
    sae.config.site = "layers.1"
    sae.save_pretrained(folder)
    assert run(*given) == 2
    said = capsys.readouterr().err
    assert "reads activations of 128 dimensions, but those at model.layers.1:output of" in said
    assert "have 16. It was made for layers.1 of" in said


def test_a_word_finds_the_steering_of_its_name(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "--max-new-tokens", "8")
    edits = [LatentEdit(12, 30.0, units="absolute"), LatentEdit(7, 20.0, units="absolute")]
    save_steering(Steering(edits, name="owls"), folder)
    assert run(*given, "--towards", "owls=2", "--when", "5") == 0
    printed = capsys.readouterr().out
    assert "owls: the saved steering, latents 12, 7" in printed
    assert run(*given, "--latent", "12=60", "7=40", "--units", "absolute", "--when", "5") == 0
    default, steered = columns(capsys.readouterr().out)
    assert columns(printed) == (default, steered)
    assert default != steered
    assert run(*given, "--towards", "owls=much") == 2
    assert "--towards owls=much: expected WORD or WORD=VALUE" in capsys.readouterr().err


def test_a_word_finds_the_latent_that_promotes_it(folder, capsys):
    given = (str(folder), "--prompt", PROMPT, "--max-new-tokens", "8")
    assert run(*given, "--towards", "owl") == 2
    said = capsys.readouterr().err
    assert f"hf-msae interpret {folder}" in said
    assert f"hf-msae find {folder} --name owl" in said
    with pytest.raises(SystemExit, match="0"):
        main(("interpret", str(folder), "--max-tokens", "3000"))
    pages = Interpretation.load(folder)
    latent = 5
    word = pages.page(latent).promoted[0].token.strip()
    best = search_promoting(word, pages)[0].latent
    capsys.readouterr()
    assert run(*given, "--towards", f"{word}=3") == 0
    printed = capsys.readouterr().out
    assert f"{word}: latent {best}, which promotes" in printed
    assert run(*given, "--latent", f"{best}=3") == 0
    assert columns(printed) == columns(capsys.readouterr().out)
    assert run(*given, "--towards", "zebrafish") == 2
    assert "promotes 'zebrafish'" in capsys.readouterr().err
