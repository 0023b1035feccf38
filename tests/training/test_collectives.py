"""What processes say to each other, by three real ones over gloo; alone, every operation is the identity.

All processes execute everything once and write down what they got, because starting them takes longer than the rest.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_msae.modeling import sparse_encoder
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup
from patience import A_MOMENT, HANG_SECONDS
from warm_processes import run_together

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training import collectives
from hf_msae.training.collectives import GradientSums, MainProcessWriter, TorchProcessGroup, row_pieces

pytestmark = pytest.mark.slow

NUMBERS = {0: [1.0, -2.0, 5.0], 1: [3.0, 4.0, -1.0], 2: [0.5, -3.0, 2.0]}
ROWS = {0: 5, 1: 3, 2: 2}


def gradients(rank: int) -> list[torch.nn.Parameter]:
    """A matrix of 40 numbers and vectors of 8 and 3, each with a gradient."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((8, 5), (8,), (3,))]
    for parameter in parameters:
        # Whole numbers, whose order of summing changes nothing.
        parameter.grad = torch.randint(-99, 100, parameter.shape, generator=generator).float()
    return parameters


def rows_of(rank: int) -> torch.Tensor:
    return 100 * rank + torch.arange(ROWS[rank] * 2).view(-1, 2)


def write_files(group: TorchProcessGroup, folder: Path) -> list[str]:
    """What a process did, of three jobs: the main one wants the last, then the first, and then it fails."""
    done: list[str] = []
    jobs = {(name, "model"): lambda path, name=name: done.append(f"{name} {path and path.name}") for name in "abc"}
    try:
        with MainProcessWriter(group, jobs) as writer:
            if group.rank == 0:
                writer.write(("c", "model"), folder / "one")
                writer.write(("a", "model"), folder / "two")
                raise OSError("no room")
    except OSError as error:
        done.append(str(error))
    return done


def one_process(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, rank = TorchProcessGroup(torch.device("cpu")), dist.get_rank()
    own = torch.tensor(NUMBERS[rank])
    got: dict[str, Any] = {"place": (group.rank, group.size)}
    for name in ("sum", "minimum", "maximum", "gather"):
        got[name] = getattr(group, name)(own.clone())
    got["total"] = group.total(10 + rank)
    got["counted"] = (dict(group.calls), dict(group.bytes))
    for size in (1, 16, 1 << 20):
        collectives.PIECE_BYTES = size
        if rank == size == 1:
            time.sleep(A_MOMENT)  # the rows of the one behind it may be there first, and must wait
        got[f"pieces {size}"] = list(group.pieces(rows_of(rank)))
    for pack in (1, 20, 1 << 20):
        collectives.PACK = pack
        parameters = gradients(rank)
        group.calls.clear()
        GradientSums(parameters, group).finish()
        got[f"gradients {pack}"] = ([parameter.grad for parameter in parameters], group.calls["reduce"])
    got["written"] = write_files(group, Path(folder))
    torch.save(got, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def got(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the processes got."""
    folder = tmp_path_factory.mktemp("collectives")
    status, written = run_together(len(ROWS), one_process, str(folder), output=folder / "output")
    assert status == 0, written
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in ROWS]


def test_every_process_gets_the_same_sums_and_extremes(got):
    whole = torch.tensor([*NUMBERS.values()])
    for rank, each in enumerate(got):
        assert each["place"] == (rank, len(ROWS))
        assert torch.equal(each["sum"], whole.sum(0))
        assert torch.equal(each["minimum"], whole.amin(0))
        assert torch.equal(each["maximum"], whole.amax(0))
        assert torch.equal(each["gather"], whole)
        assert each["total"] == 10 + 11 + 12


def test_what_travels_is_counted(got):
    for each in got:
        assert each["counted"] == ({"reduce": 4, "gather": 1}, {"reduce": 3 * 12 + 8, "gather": 12})


@pytest.mark.parametrize(("size", "pieces"), [(1, 10), (16, 10), (1 << 20, 3)])
def test_rows_come_to_the_first_process_in_order_and_in_pieces(got, size, pieces):
    first, *others = (each[f"pieces {size}"] for each in got)
    assert others == [[], []]
    assert torch.equal(torch.cat(first), torch.cat([*map(rows_of, ROWS)]))
    assert len(first) == pieces


@pytest.mark.parametrize(("pack", "messages"), [(1, 3), (20, 2), (1 << 20, 1)])
def test_gradients_are_summed_however_they_are_packed(got, pack, messages):
    expected = [sum(pair) for pair in zip(*([p.grad for p in gradients(rank)] for rank in ROWS), strict=True)]
    for each in got:
        summed, sent = each[f"gradients {pack}"]
        assert all(torch.equal(mine, its) for mine, its in zip(summed, expected, strict=True))
        assert sent == messages


class TwoAlike(ProcessGroup):
    """Two processes with the same gradients; a sum that has begun is there when it is waited for."""

    size = 2

    def __init__(self) -> None:
        self.begun: list[torch.Tensor] = []

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        self.begun.append(tensor)
        return lambda: tensor.mul_(2)


def test_a_gradient_that_is_missing_is_an_error():
    with pytest.raises(RuntimeError, match="call backward"):
        GradientSums([torch.nn.Parameter(torch.zeros(2))], TwoAlike()).finish()


def test_a_process_by_itself_sums_nothing():
    parameter = torch.nn.Parameter(torch.ones(4))
    sums = GradientSums([parameter], SINGLE_PROCESS)
    with sums.begun_early():
        parameter.sum().backward()
    sums.finish()
    assert parameter.grad.tolist() == [1.0] * 4


FORMS = {
    **{name: {"activation": name} for name in ("batch_topk", "topk", "jumprelu", "relu")},
    "transcoder with a skip": {"hidden_size_out": 12, "skip": True},
    "tokenized": {"lookup_size": 20},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_decoders_gradient_travels_before_the_encoders_is_there(form, path, num_parts, monkeypatch):
    """On every path, with dead latents, and only in the last of several backward passes: so processes agree."""
    monkeypatch.setattr(collectives, "PACK", 90)
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0 if path == "sparse" else -1.0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_latents": 32, "prefix_sizes": [8, 32], "k": 2}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(sizes | FORMS[form]))).train()
    target = torch.randn(24, 12) if sae.config.is_transcoder else None
    inputs = {"target": target, "token_ids": torch.arange(24) % 20 if sae.config.is_tokenized else None}
    group, x = TwoAlike(), torch.randn(24, 8)
    sums = GradientSums(sae.parameters(), group)
    encoded: list[bool] = []
    begin_sum = group.begin_sum
    monkeypatch.setattr(group, "begin_sum", lambda sent: encoded.append(sae.W_enc.grad is not None) or begin_sum(sent))
    for number in range(num_parts):
        part = slice(number * 24 // num_parts, (number + 1) * 24 // num_parts)
        given = {name: None if rows is None else rows[part] for name, rows in inputs.items()}
        assert group.begun == []
        with sums.begun_early() if number == num_parts - 1 else nullcontext():
            sae(x[part], **given, dead_latents=torch.arange(32) % 2 == 0, variance=1.0).loss.backward()
    names = {id(parameter.grad): name for name, parameter in sae.named_parameters()}
    large = [name for name, parameter in sae.named_parameters() if parameter.numel() >= 90]
    order = [names[id(gradient)] for gradient in group.begun]
    assert order == ["W_dec", "W_enc", *(name for name in large if name not in ("W_dec", "W_enc"))]
    assert encoded[0] == (num_parts > 1)
    whole = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sums.finish()
    assert len(group.begun) == len(large)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter.grad, 2 * whole[name]), name


def test_the_others_send_what_the_main_process_wants_until_it_leaves(got):
    main, *others = (each["written"] for each in got)
    assert main == ["c one", "a two", "no room"]
    assert others == [["c None", "a None"]] * 2


def test_alone_every_operation_is_the_identity(tmp_path):
    own, rows = torch.tensor(NUMBERS[0]), rows_of(0)
    for name in ("sum", "minimum", "maximum"):
        assert torch.equal(getattr(SINGLE_PROCESS, name)(own), own)
    assert torch.equal(SINGLE_PROCESS.gather(own), own[None])
    assert SINGLE_PROCESS.total(7) == 7
    assert torch.equal(torch.cat(list(row_pieces(rows, SINGLE_PROCESS))), rows)
    written: list[Path | None] = []
    with MainProcessWriter(SINGLE_PROCESS, {("a", "model"): written.append}) as writer:
        writer.write(("a", "model"), tmp_path)
    assert written == [tmp_path]


def patience_of_the_interrupt_group(output_dir: str) -> None:
    """What a process of a run waits for the others before it takes them for dead, where they agree on signals."""
    from hf_msae.training import SAETrainingArguments
    from hf_msae.training.run import InterruptFlag, Run

    args = SAETrainingArguments(output_dir=output_dir, use_cpu=True, ddp_timeout=HANG_SECONDS)
    group = InterruptFlag(Run(args, single=True))._group
    print("waits", group._get_backend(torch.device("cpu")).options._timeout)


def test_processes_wait_for_a_signal_no_longer_than_ddp_timeout(tmp_path):
    status, written = run_together(2, patience_of_the_interrupt_group, str(tmp_path / "run"), output=tmp_path / "out")
    assert status == 0, written
    assert written.count(f"waits {timedelta(seconds=HANG_SECONDS)}") == 2
