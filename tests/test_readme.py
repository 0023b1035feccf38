"""The documents tell the truth: their Python runs, their commands parse or run, their flags exist.

- A ```python block after a line `<!-- runs -->` is executed: all of a document, in order, as one program in an empty
  folder (README) or in one where an SAE lies, `runs/quickstart`, and some names are known (the pages of docs/; see
  `documents.py`). Another one says `<!-- not run: REASON -->`, must compile, and what it imports from hf_msae must
  exist; REASONS says what has to be true of it.
- A ```bash block after a line `<!-- commands run -->` is executed, too, command by command. Of any other one,
  `hf-msae ...` (also under `accelerate launch` and `torchrun`) goes through the real parser, and the SAEs that it asks
  for must be possible; targets of `make`, modules and scripts of `python`, extras and files of `pip` must exist. A
  program that is not known here fails, so that nothing goes unread. Each such command is one that cannot run here, or
  that another test runs: `why_not_run` says which.
- A ```yaml block that begins with `# name.yaml` is that file for `--config name.yaml`; any other file is the
  checkout's of that name, or empty.
- `--flags` in the text must be flags of some command, of a script in `benchmarks/` or `examples/`, or of
  `accelerate launch`.
"""

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from command_parsers import parser_of
from documents import NAMES, make_folder, run_page
from huggingface_hub.errors import StrictDataclassError
from warm_processes import run_together

from hf_msae.cli import quickstart
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.main import COMMANDS, overview
from hf_msae.cli.parser import parse
from hf_msae.cli.train import GridArguments, next_steps
from hf_msae.data.cache_files import FORMAT
from hf_msae.data.unfinished import INDEX
from hf_msae.training import make_saes
from hf_msae.worlds.stories import load_story_lm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
BESIDE_CODE = ["examples/README.md", "skills/hf-msae/SKILL.md"]
DOCUMENTS = [*(path.name for path in sorted(ROOT.glob("*.md")) if path.name != "CHANGELOG.md"), *PAGES, *BESIDE_CODE]
MARK = "<!-- runs -->"
SHELL_MARK = "<!-- commands run -->"
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# Languages of blocks that show output or layout, in which there is nothing to check.
SHOWN = {"", "text", "json", "bibtex", "yaml"}
# Programs of which a reader's machine, not this repository, decides whether they work.
OTHERS = {"git", "cd", ".", "source"}


class Block(NamedTuple):
    """A fenced block: its language, the line where its code begins (from 1), its code, whether it runs, or why not."""

    language: str
    line: int
    code: str
    runs: bool
    reason: str = ""


def read_blocks(text: str) -> list[Block]:
    blocks, lines = [], [*text.splitlines(), ""]
    number = 0
    while number < len(lines):
        above = lines[number - 1].strip() if number > 0 else ""
        excuse = NOT_RUN.fullmatch(above)
        fence = re.fullmatch(r"(`{3,})\s*(\w*)", lines[number])
        wanted = "bash" if above == SHELL_MARK else "python"
        marked = above in (MARK, SHELL_MARK)
        if (marked or excuse) and (fence is None or fence[2] != wanted):
            raise ValueError(f"line {number}: {above} must stand right above a ```{wanted} block")
        if fence is None and re.match(r"\s*(```|~~~)", lines[number]):
            raise ValueError(f"line {number + 1}: a fence must be ``` and a language, and nothing around them")
        number += 1
        if fence is not None:
            if fence[1] not in lines[number:]:
                raise ValueError(f"line {number}: a block that never ends")
            end = lines.index(fence[1], number)
            code = "\n".join(lines[number:end]) + "\n"
            blocks.append(Block(fence[2], number + 1, code, marked, excuse[1] if excuse else ""))
            number = end + 1
    return blocks


def read_commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; comments and `NAME=value` in front are left out."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word in ("&&", ";", "|", "||"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


# Commands


@cache
def all_flags() -> set[str]:
    parsers = map(parser_of, COMMANDS)
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


@cache
def script_flags() -> set[str]:
    """What the scripts of `benchmarks/` and `examples/` take."""
    sources = [path.read_text() for name in ("benchmarks", "examples") for path in (ROOT / name).rglob("*.py")]
    return {flag for source in sources for flag in re.findall(r'add_argument\("(--[\w-]+)"', source)}


@cache
def launcher_flags() -> set[str]:
    """What `accelerate launch` takes."""
    return {flag for action in launch_command_parser()._actions for flag in action.option_strings}


def check_hf_msae(arguments: list[str], folder: Path) -> None:
    if arguments in ([], ["--help"], ["--version"]):
        return
    if arguments[0] not in COMMANDS:
        raise ValueError(f"hf-msae has no command {arguments[0]!r}")
    if arguments[1:] == ["--help"]:
        return
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        file = ROOT / arguments[place]
        if not file.is_file():
            file = folder / arguments[place]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        arguments = [*arguments[:place], str(file), *arguments[place + 1 :]]
    for values in parse(parser_of(arguments[0]), arguments[1:]):
        if isinstance(values, GridArguments):
            make_saes(load_story_lm()[0], **dataclasses.replace(values, site=[]).grid())


def check_launcher(parser: Any, arguments: list[str], folder: Path) -> None:
    args = parser.parse_args(arguments)
    as_module = ["-m"] if args.module else []
    check_python([*as_module, args.training_script, *args.training_script_args], folder)


def check_accelerate(arguments: list[str], folder: Path) -> None:
    if arguments[:1] == ["launch"]:
        check_launcher(launch_command_parser(), arguments[1:], folder)
    elif arguments != ["config"]:
        raise ValueError(f"no check for `accelerate {shlex.join(arguments)}`")


def check_torchrun(arguments: list[str], folder: Path) -> None:
    check_launcher(torch.distributed.run.get_args_parser(), arguments, folder)


def check_python(arguments: list[str], folder: Path) -> None:
    if arguments[0] == "-m" and arguments[1] == "hf_msae.cli":
        check_hf_msae(arguments[2:], folder)
    elif arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise ValueError(f"there is no module {arguments[1]}")
    elif arguments[0] == "-c":
        check_imports(arguments[1], "-c")
    elif not (ROOT / arguments[0]).is_file():
        raise ValueError(f"there is no script {arguments[0]}")


def check_make(arguments: list[str], folder: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    missing = [word for word in arguments if "=" not in word and not word.startswith("-") and word not in targets]
    if missing:
        raise ValueError(f"the Makefile has no target {', '.join(missing)}")


def check_pip(arguments: list[str], folder: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for word in arguments:
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"^(?:\.|hf-msae)\[(.*)\]", word))):
            if re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) is None:
                raise ValueError(f"pyproject.toml has no extra {extra!r}")
        if word.endswith(".txt") and not (ROOT / word).is_file():
            raise ValueError(f"there is no file {word}")


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "hf-msae": check_hf_msae,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "python": check_python,
    "python3": check_python,
    "make": check_make,
    "pip": check_pip,
}


def check_shell(code: str, folder: Path) -> None:
    """Raises an error, or SystemExit as parsers do, for a command that cannot work; files are made in `folder`."""
    for program, *arguments in read_commands(code):
        if program in CHECKS:
            CHECKS[program](arguments, folder)
        elif program not in OTHERS:
            raise ValueError(f"no check is known for {program!r}: add one, or add it to OTHERS")


def check_imports(code: str, name: str) -> None:
    """Compile the code and execute its imports from hf_msae."""
    tree = ast.parse(code, name)
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(module.split(".")[0] == "hf_msae" for module in modules):
            exec(compile(ast.Module([node], type_ignores=[]), name, "exec"), {})  # type: ignore[list-item]


def run_python(document: str, blocks: list[Block], folder: Path) -> tuple[int, str]:
    """The marked blocks as one program, in an empty folder and without the network: its status, what it printed."""
    run = [[block.language, block.line, block.code] for block in blocks if block.runs and block.language == "python"]
    (folder / "here").mkdir()
    return run_together(1, run_page, str(folder / "here"), document, run, "", output=folder / "out")


# The checks themselves, on documents that are known to be right or wrong

SAMPLE = """\
Train with `--k 16`.

<!-- runs -->
```python
text = '''
``` '''
count = 3
```

```bash
SEED=1 hf-msae train \\
    --k 4 8  # twice
make quickstart && make test
```
"""


def test_blocks_are_found() -> None:
    first, second = read_blocks(SAMPLE)
    assert first == Block("python", 5, "text = '''\n``` '''\ncount = 3\n", True)
    assert second[:2] == ("bash", 11)
    assert not second.runs
    assert list(read_commands(second.code)) == [
        ["hf-msae", "train", "--k", "4", "8"],
        ["make", "quickstart"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- runs -->\n\n```python\n```\n", "line 1: .* right above"),
        ("<!-- runs -->\n```bash\nls\n```\n", "line 1: .* right above"),
        ("text\n<!-- runs -->", "line 2: .* right above"),
        ("a\n```bash\nls\n", "line 2: a block that never ends"),
        ("- a\n  ```bash\n  ls\n  ```\n", "line 2: a fence must be"),
        ("```python title=a\n```\n", "line 1: a fence must be"),
    ],
)
def test_a_document_that_would_go_unread_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(text)


@pytest.mark.parametrize(
    "code",
    [
        "hf-msae train --num-latents 2k --k 16 --k 32 --prefix-sizes 1/8 1 --report-to tensorboard",
        "hf-msae cache-activations --site layers.1 --max-tokens 5M --output-dir cache",
        "accelerate launch --num_processes 2 -m hf_msae.cli train --batch-size 128",
        "torchrun --nproc-per-node 2 -m hf_msae.cli train --config run.yaml",
        "python scripts/train_story_lm.py",
        "pip install --constraint constraints.txt '.[test,quality]'",
        "make quickstart PYTHON=python3.12",
    ],
)
def test_right_commands_pass(code: str, tmp_path: Path) -> None:
    check_shell(code, tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("hf-msae trian", "no command 'trian'"),
        ("hf-msae train --num-latent-counts 5", "--num-latent-counts"),
        ("accelerate launch -m hf_msae.cli train --num-latent-counts 5", "--num-latent-counts"),
        ("torchrun -m hf_msae.cli train --num-latent-counts 5", "--num-latent-counts"),
        ("true=1 hf-msae train --num-latents 64 --k 100", "k must be above 0 and at most num_latents=64"),
        ("hf-msae train --max-tokens 1k", "less than one batch"),
        ("hf-msae train --config run.yaml", "unknown key 'site_name'"),
        ("make quickstart && make unicorns", "no target unicorns"),
        ("python -m hf_msae.unicorns", "no module hf_msae.unicorns"),
        ("python scripts/unicorns.py", "no script scripts/unicorns.py"),
        ("pip install 'hf-msae[unicorns]'", "no extra 'unicorns'"),
        ("pip install -r unicorns.txt", "no file unicorns.txt"),
        ("echo hello", "no check is known for 'echo'"),
    ],
)
def test_wrong_commands_fail(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("site_name: layers.1\n")
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        check_shell(code, tmp_path)


@pytest.mark.parametrize("code", ["hf-msae train --k many", "accelerate launch --unicorns 2 -m hf_msae.cli train"])
def test_wrong_values_fail(code: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        check_shell(code, tmp_path)
    assert "error: " in capsys.readouterr().err


def test_wrong_imports_fail() -> None:
    check_imports("import nothing\nfrom hf_msae.sites import capture\n", "README.md")
    with pytest.raises(ImportError, match="unicorns"):
        check_imports("def f():\n    from hf_msae.sites import unicorns\n", "README.md")
    with pytest.raises(SyntaxError):
        check_imports("a b\n", "README.md")


def test_marked_blocks_share_names_and_fail_by_line(tmp_path: Path) -> None:
    after = "\n<!-- runs -->\n```python\nopen('count', 'w').write(str(count))\ncount / 0\n```\n"
    status, printed = run_python("README.md", read_blocks(SAMPLE + after), tmp_path)
    assert (tmp_path / "here" / "count").read_text() == "3"
    assert 'File "README.md", line 19' in printed
    assert "ZeroDivisionError" in printed
    assert status == 1


# The documents


def blocks_of(*languages: str) -> list[Any]:
    found = [(document, block) for document in DOCUMENTS for block in read_blocks((ROOT / document).read_text())]
    return [
        pytest.param(document, block, id=f"{document}:{block.line}")
        for document, block in found
        if block.language in languages
    ]


def test_every_block_is_of_a_known_language() -> None:
    languages = {block.language for document in DOCUMENTS for block in read_blocks((ROOT / document).read_text())}
    assert {"bash", "python"} <= languages
    assert languages <= {"bash", "python"} | SHOWN


@pytest.mark.parametrize(("document", "block"), blocks_of("bash"))
def test_the_commands_are_right(document: str, block: Block, tmp_path: Path) -> None:
    for other in read_blocks((ROOT / document).read_text()):
        name = re.match(r"# ([\w./-]+\.ya?ml)\n", other.code)
        if other.language == "yaml" and name is not None:
            (tmp_path / name[1]).write_text(other.code)
    check_shell(block.code, tmp_path)


@pytest.mark.parametrize(("document", "block"), blocks_of("python"))
def test_the_python_compiles_and_its_imports_exist(document: str, block: Block) -> None:
    check_imports(block.code, document)


def test_the_marked_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = read_blocks((ROOT / "README.md").read_text())
    assert any(block.runs for block in blocks)
    status, printed = run_python("README.md", blocks, tmp_path)
    assert status == 0, printed[-4000:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_the_text_exist(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    flags = {
        flag for code in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert flags <= all_flags() | script_flags() | launcher_flags() | {"--help", "--version"}


def test_what_a_run_on_a_cache_was_measured_on_is_what_comes_next(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"format": FORMAT}))
    steps = next_steps(Path("runs/a"), SourceArguments(dataset=str(tmp_path), eval_dataset="texts.jsonl"))
    assert steps.count("runs/a --dataset texts.jsonl ") == 2
    assert str(tmp_path) not in steps
    assert "--eval-dataset" not in steps


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": "owner/model", "dataset": "owner/text", "dataset_name": "en", "dataset_revision": "abc"},
        {"model": "models/lm", "dataset": "a folder/it's.txt", "separator": "## \\n", "trust_remote_code": True},
        {"model": "owner/model", "dataset": "chats.jsonl", "messages_column": "turns", "model_dtype": "bfloat16"},
    ],
)
def test_the_commands_that_the_program_proposes_are_right(given: dict[str, Any], tmp_path: Path) -> None:
    steps = next_steps(Path("runs/my first"), SourceArguments(**given))
    assert len(list(read_commands(steps.split("Next:")[1]))) == 3
    check_shell(steps.split("Next:")[1], tmp_path)
    assert "..." not in steps
    for line in steps.split("Next:")[1].strip().splitlines()[:2]:
        command, *arguments = shlex.split(line.split("      #")[0])[1:]
        sources = [values for values in parse(parser_of(command), arguments) if isinstance(values, SourceArguments)]
        known = {name: value for name, value in given.items() if name != "model"}
        assert {name: getattr(sources[0], name) for name in known} == known
    check_shell(overview().split("examples:")[1], tmp_path)
    check_shell(quickstart.next_steps("runs/my first").split("Next:")[1], tmp_path)


@pytest.fixture(scope="module")
def folder_of_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages find around them; each gets a copy."""
    folder = tmp_path_factory.mktemp("pages")
    make_folder(folder)
    return folder


def runs_of(page: str) -> list[list[Any]]:
    """What of a page is executed: the language, the line, and the code or the words of each command."""
    return [
        [block.language, block.line, block.code if block.language == "python" else list(read_commands(block.code))]
        for block in read_blocks((ROOT / page).read_text())
        if block.runs
    ]


# What the example of the page about training leaves in memory, what it left on disk, and what the SAE in memory is
# saved as by hand, are one SAE.
HELD_AND_SAVED = """
import torch
from hf_msae.sites import capture, resolve_site
texts = StoryWorld(seed=5).documents(4)
inputs = tokenizer([text[:200] for text in texts], return_tensors="pt", padding=True)
site = resolve_site(model, sae.config.site)
x = capture(model, [site], **inputs)[site]
sae.save_pretrained("runs/by-hand")
l0 = (sae.encode(x) > 0).sum(-1).float().mean()
assert 8 < l0 < 32, l0
for folder in ("runs/python", "runs/by-hand"):
    assert torch.equal(MatryoshkaSAE.from_pretrained(folder).encode(x), sae.encode(x)), folder
print("in memory as on disk")
"""
TRAINING = "docs/training.md"


@pytest.mark.parametrize("page", [page for page in PAGES if runs_of(page)])
def test_what_a_page_says_that_runs_runs(page: str, folder_of_pages: Path, tmp_path: Path) -> None:
    """The page about training, which the README names, stands alone, and after its example is what that must leave."""
    blocks, known = runs_of(page), NAMES
    if page == TRAINING:
        assert f"({page})" in (ROOT / "README.md").read_text()
        (example,) = [number for number, (_, _, code) in enumerate(blocks) if "SAETrainer(" in code]
        blocks.insert(example + 1, ["python", 1, HELD_AND_SAVED])
        known = ""
    shutil.copytree(folder_of_pages, tmp_path / "here")
    status, printed = run_together(1, run_page, str(tmp_path / "here"), page, blocks, known, output=tmp_path / "out")
    assert status == 0, printed[-4000:]
    assert printed.count("in memory as on disk") == (page == TRAINING)


def names_of_hf_msae(code: str) -> set[str]:
    """The names that a program imports from hf_msae."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports if (node.module or "").startswith("hf_msae") for alias in node.names}


@cache
def sources_of_tests(folder: str) -> str:
    others = [path for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    return "\n".join(path.read_text() for path in others)


def is_tested(name: str, folder: str = "tests") -> bool:
    """Whether a test names it."""
    return re.search(rf"\b{re.escape(name)}\b", sources_of_tests(folder)) is not None


# Why Python of a document is not executed, and what is then true of it.
REASONS: dict[str, Callable[[str], bool]] = {
    "it needs the Hub": lambda code: re.search(r"\"[\w-]+/[\w.-]+\"", code) is not None,
    "it needs the Hub and a GPU": lambda code: (
        "get_kernel(" in code and 'device="cuda"' in code and all(map(is_tested, re.findall(r"sae_ops\.(\w+)", code)))
    ),
    "it needs several processes": lambda code: "shard_latents" in code,
    "it needs a server": lambda code: (
        "http://127.0.0.1" in code
        and any(f"import {client}" in code and is_tested(client) for client in ("OpenAI", "Client"))
    ),
    "it takes minutes": lambda code: all(is_tested(name) for name in names_of_hf_msae(code)),
}


@pytest.mark.parametrize(("document", "block"), blocks_of("python"))
def test_python_runs_or_says_why_not(document: str, block: Block) -> None:
    assert block.runs or block.reason in REASONS, "mark it `<!-- runs -->` or `<!-- not run: REASON -->`"
    if block.reason:
        assert REASONS[block.reason](block.code)
        without_hf_msae = ("it needs a server", "it needs the Hub and a GPU")
        assert names_of_hf_msae(block.code) or block.reason in without_hf_msae


HUB_NAME = re.compile(r"[A-Za-z][\w-]*/[\w.-]+")
# Commands that end only when somebody ends them, and what they start is tried in the tests.
SERVERS = {("hf-msae", "demo"), ("hf-msae", "space"), ("hf-msae", "serve"), ("make", "demo")}
# Folders that documents name, where the Hub would be meant otherwise.
FOLDERS = ("runs/", "cache/", "saes/", "export/")


def why_not_run(words: list[str]) -> str:
    """Why a command of a document is not executed as it stands; empty where nothing excuses it."""
    program, *arguments = words
    if program in OTHERS or program in ("pip", "make", "python3") or arguments[:2] == ["-m", "pytest"]:
        return "it sets up a machine"
    if tuple(words[:2]) in SERVERS:
        return "it serves until it is stopped"
    if program in ("accelerate", "torchrun"):
        return "it needs several processes or an accelerator"
    if any(HUB_NAME.fullmatch(word) and not word.startswith(FOLDERS) for word in arguments):
        return "it needs the Hub"
    if program == "python":
        return "it takes minutes; a test runs it smaller" if is_tested(Path(arguments[0]).stem) else ""
    if program == "hf-msae" and is_tested(arguments[0], "tests/cli"):
        return "tests/cli runs it"
    return ""


@pytest.mark.parametrize(("document", "block"), blocks_of("bash"))
def test_commands_run_or_something_excuses_them(document: str, block: Block) -> None:
    if not block.runs:
        assert [words for words in read_commands(block.code) if not why_not_run(words)] == []


def sentences(text: str) -> Iterator[str]:
    """The sentences of a document, without blocks, tables and headings."""
    text = re.sub(r"^```.*?^```|^<!--.*-->|^\|.*|^#.*|^ {4}.*", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.:?!])\s+", " ".join(paragraph.split()))


def test_no_sentence_stands_in_two_documents() -> None:
    places: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for sentence in sentences((ROOT / document).read_text()):
            if len(sentence) > 60:
                places.setdefault(sentence, set()).add(document)
    assert {sentence: where for sentence, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_what_its_reader_can_do_after_it(page: str) -> None:
    title, nothing, first, *_ = (ROOT / page).read_text().splitlines()
    assert title.startswith("# ")
    assert not nothing
    assert first.startswith("After this page you ")
    assert first.endswith(".")


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            named.extend([] if "://" in entry else [f"docs/{entry}"])
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                walk(value)

    walk(navigation)
    assert sorted(named) == PAGES
    readme = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if "reference" not in page and f"]({page}" not in readme] == []


def test_the_readme_is_short_and_its_ratios_are_those_of_the_page_about_performance() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    row = next(line for line in readme.splitlines() if line.startswith("| one training step"))
    measured = (ROOT / "docs" / "performance.md").read_text()
    ratios = re.findall(r"\d+\.\d+", row)
    assert len(ratios) == 6
    assert [ratio for ratio in ratios if ratio not in measured] == []
    claimed = re.findall(r"\.\d{3} ± \.\d{3}", readme)
    assert len(claimed) >= 10
    papers = (ROOT / "docs" / "papers.md").read_text()
    assert [claim for claim in claimed if claim.replace(".", "0.") not in papers] == []


def test_links_between_documents_lead_somewhere() -> None:
    """mkdocs holds those of the site; these are of the files, as GitHub shows them."""
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text()):
            if not re.match(r"https?:|mailto:", link):
                assert ((ROOT / document).parent / link).exists(), (document, link)


def test_no_page_says_the_same_line_twice():
    """As automatic edits leave behind; headers of tables may repeat."""
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        lines = page.read_text(encoding="utf-8").splitlines()
        long = [line for line in lines if len(line) > 40 and not set(line) <= set("|-: ")]
        rows = {line for line in long if long.count(line) > 1}
        # A table's header is the line above its rule.
        headers = {above for above, line in pairwise(lines) if line and set(line) <= set("|-: ")}
        assert not rows - headers, page.name
