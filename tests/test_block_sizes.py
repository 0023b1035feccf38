"""Work is cut into blocks so that memory stays small, and the size of a block never changes what comes out.

Every constant that sets such a size is found in the source, and is either set here to one, to a few, and to more than
there is, or named with the test that does so.
"""

import ast
import importlib
from collections.abc import Callable
from dataclasses import astuple, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_msae.modeling.selection import SINGLE_PROCESS

import hf_msae
from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.concepts.reading import auroc
from hf_msae.corpora.blocks import DocumentBlocks
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import TokenWindows, as_documents, collate
from hf_msae.evaluation.activations import TextActivations, tokens_at_once
from hf_msae.evaluation.core import rate_distortion
from hf_msae.evaluation.geometry import measure_agreement, measure_geometry, nearest_rows
from hf_msae.evaluation.labelled import LabelledActivations, encoder_of
from hf_msae.evaluation.probes import draw_samples, fit_probes, make_split
from hf_msae.evaluation.probing import measure_probing
from hf_msae.interpret import Labeller
from hf_msae.interpret.activity import active_latents, gains
from hf_msae.interpret.cofiring import Cofirings
from hf_msae.interpret.edges import find_candidates
from hf_msae.interpret.effects import LogitEffects, final_norm_jacobian, nearest_latents
from hf_msae.interpret.hierarchy import HierarchySettings
from hf_msae.interpret.scan import scan
from hf_msae.research.detection import measure_detection
from hf_msae.research.novelty import measure_level_novelty
from hf_msae.research.toys import Samples
from hf_msae.research.toys.synth_bench import pushed_apart
from hf_msae.sites import resolve_site
from hf_msae.training.collectives import row_pieces
from hf_msae.training.end_to_end import divergence

pytestmark = pytest.mark.slow

SIZES = (1, 7, 100, 1000, 1 << 40)
# What a name must end in to be the size of a block.
ENDINGS = ("AT_ONCE", "CHUNK", "CHUNK_BYTES", "PACK", "PIECE_BYTES", "PER_BATCH", "TILE", "TILE_TOKENS")
ELSEWHERE = {
    "hf_msae.data.text_files.CHUNK_BYTES": "tests/data/test_documents.py",
    "hf_msae.modeling.ranged_files.CHUNK": "tests/modeling/test_prefix_loading.py",
    "hf_msae.modeling.sparse_encoder.CPU_CHUNK": "tests/modeling/test_modeling.py",
    "hf_msae.modeling.sparse_encoder.CPU_TILE": "tests/modeling/test_sparse_ops.py",
    "hf_msae.modeling.sparse_encoder.CPU_TILE_TOKENS": "tests/modeling/test_sparse_ops.py",
    "hf_msae.modeling.sparse_encoder.GPU_CHUNK": "as CPU_CHUNK",
    "hf_msae.modeling.sparse_encoder.GPU_TILE": "as CPU_TILE",
    "hf_msae.modeling.sparse_encoder.GPU_TILE_TOKENS": "as CPU_TILE_TOKENS",
    "hf_msae.training.collectives.PACK": "tests/training/test_sharded.py",
    "hf_msae.training.optimization.CPU_CHUNK": "tests/training/test_optimization.py",
    "hf_msae.training.initial_weights.DRAWN_AT_ONCE": "tests/training/test_sharded.py",
    "hf_msae.research.toys.sampling.CHUNK": "each block draws its own random numbers",
    "hf_msae.research.toys.synth_bench.NUMBERS_AT_ONCE": "each block draws its own random numbers",
}


class World:
    """A random LM with an SAE at its first layer, and what the cases need of both."""

    def __init__(self, lm, tokenizer, texts) -> None:
        torch.manual_seed(3)
        self.lm, self.tokenizer, self.texts = lm, tokenizer, texts
        self.site = resolve_site(lm, "layers.0")
        self.x = torch.randn(300, 16)
        self.sae = self.make("batch_topk")
        self.dense = self.make("relu")
        labels = torch.rand(300, 3) < 0.4
        directions = torch.randn(3, 16)
        self.labelled = LabelledActivations(
            labels.float() @ directions + torch.randn(300, 16), labels, ["a", "b", "c"], torch.arange(300) // 2, "made"
        )

    def make(self, activation: str) -> MatryoshkaSAE:
        config = MatryoshkaSAEConfig(
            hidden_size=16, num_latents=40, prefix_sizes=[5, 40], k=6, activation=activation, site=str(self.site)
        )
        sae = MatryoshkaSAE(config).eval()
        sae.threshold.fill_(0.0 if activation == "relu" else 0.4)
        return sae

    def text_activations(self) -> TextActivations:
        return TextActivations(self.lm, self.site, [], 0, 4, self.x, "random rows")

    def scanned(self) -> Any:
        return scan(self.lm, self.tokenizer, self.dense, self.texts[:40], max_tokens=600)


def effects(world: World) -> Any:
    found = LogitEffects(world.lm, world.sae.W_dec, world.x[:5])
    return found.extremes(4), nearest_latents(world.sae.W_dec, 3)


def jacobian(world: World) -> Any:
    return final_norm_jacobian(world.lm, world.lm.get_output_embeddings(), world.x[:5])


def worth(world: World) -> Any:
    active = active_latents(world.sae, world.x)
    return gains(world.sae, active, world.x - world.sae.decode(world.sae.encode(world.x)))


def counted_pairs(world: World) -> Any:
    cofirings = Cofirings(world.scanned().firings, 40)
    counts = torch.cat([block for _, block in cofirings.counts(range(5, 40), 5)])
    return counts, astuple(cofirings.sums(torch.tensor([0, 3, 1]), torch.tensor([9, 30, 22])))


def edges(world: World) -> Any:
    settings = HierarchySettings(min_firings=1, min_shared=1, min_coverage=0.0)
    found = find_candidates(world.dense, world.scanned().firings, settings)
    assert len(found.edges) > 50
    return sorted(astuple(edge) for edge in found.edges), found.residual_threshold


def probabilities(world: World) -> Any:
    return Labeller(world.lm, _Answers(world.tokenizer)).probabilities([" ".join(["w1"] * n) for n in range(1, 12)])


class _Answers:
    """The tests' tokenizer, but for two words that it has as an answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer.encode({"Yes": "w3", "No": "w4"}.get(text.strip(), "w5"), **options)


def geometry(world: World) -> Any:
    rate = torch.linspace(0, 1, 40)  # the first latent is dead
    unit = torch.nn.functional.normalize(world.sae.W_dec.detach(), dim=1)
    both = [("one", world.sae, rate), ("two", world.dense, rate)]
    return measure_geometry(world.sae, rate), measure_agreement(*both), nearest_rows(unit, unit[:9])


def probes(world: World) -> Any:
    train, test = draw_samples(world.labelled, 0)
    columns = torch.tensor([[0, 3], [5, 1], [2, 4]])
    whole, few = fit_probes(world.labelled.raw, train), fit_probes(world.labelled.raw, train, columns)
    logits = [probe.logits(world.labelled.raw, test) for probe in (whole, few)]
    return whole.direction, few.direction, few.bias, logits


def encoded(world: World) -> Any:
    assert tokens_at_once(world.sae) >= 64
    encode, at_once = encoder_of(world.sae)
    means = world.labelled.class_means(encode, at_once, torch.arange(300) % 3 > 0)
    text = world.text_activations()
    features = world.labelled.features(encode, at_once, torch.tensor([3, 8]))
    return means, features, rate_distortion(world.sae, world.x), measure_level_novelty(text, world.sae)


def references(world: World) -> Any:
    return measure_probing(world.labelled, {}, [make_split(world.labelled, 0)]).scores


def cross_entropies(world: World) -> Any:
    windows = list(TokenWindows(world.texts[:30], world.tokenizer, context_length=16))
    return measure_cross_entropy(world.lm, world.site, world.sae, world.x.mean(0), [collate(windows, 0)])


def windows(world: World) -> Any:
    found = list(TokenWindows(world.texts[:40], world.tokenizer, context_length=16))
    return [window.input_ids for window in found], [window.keep.float() for window in found]


def blocks_of_documents(world: World) -> Any:
    documents = as_documents(world.texts[:40])
    blocks = list(DocumentBlocks(documents, world.tokenizer, context_length=16, block_tokens=200))
    numbers = [number for block in blocks for number in block.numbers]
    return numbers, [placed.window.input_ids for block in blocks for placed in block.windows]


def divergences(world: World) -> Any:
    clean, logits = world.x[:60].view(3, 20, -1), world.x[60:120].view(3, 20, -1)
    return divergence(clean, logits, torch.arange(60).view(3, 20) % 7 > 0)


def detections(world: World) -> Any:
    directions = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    features = world.x @ directions.T - 3
    batches = [Samples(part, of_part) for part, of_part in zip(world.x.split(90), features.split(90), strict=True)]
    return [measure_detection(sae, directions, batches) for sae in (world.sae, world.dense)]


def apart(world: World) -> Any:
    return pushed_apart(torch.nn.functional.normalize(world.x[:40], dim=1), steps=5, rate=1e-3)


def pieces(world: World) -> Any:
    return torch.cat(list(row_pieces(world.x, SINGLE_PROCESS)))


def aurocs(world: World) -> Any:
    return auroc(world.x.round(decimals=1), world.labelled.labels[:, 0])


CASES: dict[str, Callable[[World], Any]] = {
    "hf_msae.concepts.reading.NUMBERS_AT_ONCE": aurocs,
    "hf_msae.corpora.blocks.CHARACTERS_PER_BATCH": blocks_of_documents,
    "hf_msae.data.windows.DOCUMENTS_PER_BATCH": windows,
    "hf_msae.evaluation.activations.LATENTS_AT_ONCE": encoded,
    "hf_msae.evaluation.geometry.ROWS_AT_ONCE": geometry,
    "hf_msae.evaluation.probes.NUMBERS_AT_ONCE": probes,
    "hf_msae.evaluation.probing.TOKENS_AT_ONCE": references,
    "hf_msae.interpret.activity.DENSE_AT_ONCE": lambda world: active_latents(world.dense, world.x),
    "hf_msae.interpret.activity.PRODUCT_AT_ONCE": worth,
    "hf_msae.interpret.cofiring.COUNTS_AT_ONCE": counted_pairs,
    "hf_msae.interpret.cofiring.PAIRS_AT_ONCE": counted_pairs,
    "hf_msae.interpret.edges.NUMBERS_AT_ONCE": edges,
    "hf_msae.interpret.effects.EFFECTS_AT_ONCE": effects,
    "hf_msae.interpret.effects.TANGENTS_AT_ONCE": jacobian,
    "hf_msae.interpret.labels.PROMPTS_AT_ONCE": probabilities,
    "hf_msae.cross_entropy._Sums.CHUNK": cross_entropies,
    "hf_msae.research.detection.ROWS_AT_ONCE": detections,
    "hf_msae.research.toys.synth_bench.ROWS_AT_ONCE": apart,
    "hf_msae.training.collectives.PIECE_BYTES": pieces,
    "hf_msae.training.end_to_end.CHUNK": divergences,
}


@pytest.fixture(scope="module")
def world(lm, tokenizer, texts) -> World:
    return World(lm, tokenizer, texts)


def flat(result: Any) -> list[torch.Tensor]:
    """Everything numeric in a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result.detach().double()]
    if is_dataclass(result):
        return flat(astuple(result))
    if isinstance(result, dict):
        return flat(list(result.values()))
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in flat(part)]
    return [torch.tensor(float(result)).double()] if isinstance(result, int | float) else []


@pytest.mark.parametrize("name", CASES)
def test_the_size_of_a_block_changes_nothing(world, monkeypatch, name):
    expected = flat(CASES[name](world))
    assert sum(int((tensor != 0).sum()) for tensor in expected) > 10
    owner, constant = name.rsplit(".", 1)
    for size in SIZES:
        monkeypatch.setattr(_resolve(owner), constant, size)
        found = flat(CASES[name](world))
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def _resolve(owner: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(owner)
    except ModuleNotFoundError:
        module, name = owner.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def test_every_size_of_a_block_is_tried():
    assert _sizes_in_the_source() == {*CASES, *ELSEWHERE}
    assert all(place.startswith(("tests/", "as ", "each ")) for place in ELSEWHERE.values())
    root = Path(__file__).parent.parent
    for name, place in ELSEWHERE.items():
        if place.startswith("tests/"):
            assert name.rsplit(".", 1)[1] in (root / place).read_text(), (name, place)


def _sizes_in_the_source() -> set[str]:
    package, modeling = Path(hf_msae.__file__).parent, Path(hf_msae.modeling.__file__).parent
    found = set()
    for folder, name in ((package, "hf_msae"), (modeling, "hf_msae.modeling")):
        for path in folder.rglob("*.py"):
            module = ".".join([name, *path.relative_to(folder).with_suffix("").parts])
            found |= {f"{module}.{constant}" for constant in _constants(ast.parse(path.read_text()))}
    return found


def _constants(tree: ast.Module) -> set[str]:
    """Names, of a module and of its classes, that end as a size does and are set to a number."""
    found = set()
    for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        prefix = f"{scope.name}." if isinstance(scope, ast.ClassDef) else ""
        for node in scope.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.endswith(ENDINGS) and _is_number(node.value):
                    found.add(prefix + name)
    return found


def _is_number(node: ast.expr) -> bool:
    return all(isinstance(part, ast.Constant | ast.BinOp | ast.operator) for part in ast.walk(node))
