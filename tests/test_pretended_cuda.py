"""The pretended GPU itself: what CUDA refuses fails, what CUDA waits for is recorded, and numbers are the CPU's."""

import pytest
import torch
from pretended_cuda import DEVICE, MixedDevices, PretendedCuda, PretendedTensor, pretended_cuda


@pytest.fixture
def device():
    with pretended_cuda() as found:
        yield found


def operations(events) -> list[str]:
    return [event.operation for event in events]


def test_tensors_say_where_they_are(device: PretendedCuda) -> None:
    made = torch.ones(2, 3, device=DEVICE)
    moved = torch.ones(2, 3).to(DEVICE)
    for tensor in (made, moved, made.view(6)[2:], made + 1, made.new_zeros(2), torch.empty_like(moved)):
        assert isinstance(tensor, PretendedTensor)
        assert tensor.device == DEVICE
        assert tensor.is_cuda
    assert not made.cpu().is_cuda
    module = torch.nn.Linear(3, 2).to(DEVICE)
    assert all(isinstance(parameter, PretendedTensor) and parameter.requires_grad for parameter in module.parameters())
    assert module.weight.to(DEVICE) is module.weight


def test_numbers_and_gradients_are_those_of_the_cpu(device: PretendedCuda) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(3, 2)
    x = torch.randn(5, 3)
    plain(x)[:, 0].square().sum().backward()
    moved = torch.nn.Linear(3, 2).to(DEVICE)
    moved.load_state_dict({name: tensor.to(DEVICE) for name, tensor in plain.state_dict().items()})
    moved(x.to(DEVICE))[:, 0].square().sum().backward()
    for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad.cpu())
    optimizers = [torch.optim.Adam(module.parameters(), fused=True) for module in (plain, moved)]
    for optimizer in optimizers:
        optimizer.step()
    for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x @ y,
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.add_(y),
        lambda x, y: y.add_(x),
        lambda x, y: torch.nn.functional.linear(x, y),
        lambda x, y: torch.cat([x[0], y[0, 0, None]]),
        lambda x, y: y.index_add_(0, torch.tensor([0, 1], device=DEVICE), x[:2]),
        lambda x, y: x.index_put_((torch.tensor([0], device=DEVICE),), y[:1]),
    ],
)
def test_what_mixes_devices_fails(device: PretendedCuda, mix) -> None:
    with pytest.raises(MixedDevices, match=r"test_pretended_cuda\.py:\d+"):
        mix(torch.ones(3, 3, device=DEVICE), torch.ones(3, 3))


def test_numbers_of_the_cpu_travel_with_the_launch(device: PretendedCuda) -> None:
    x, number = torch.ones(3, device=DEVICE), torch.tensor(2.0)
    x[1:] = 7
    x[x > 5] = 0
    assert ((x + number) * 3).mul_(number).clamp(max=number).cpu().tolist() == [2, 2, 2]
    assert torch.where(x > 0, 1.0, x).cpu().tolist() == [1, 0, 0]
    assert operations(device.syncs) == ["copy_", "copy_"]  # the two reads above


@pytest.mark.parametrize(
    ("wait", "operation"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: int(x[0]), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.long().bincount(), "bincount"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[torch.tensor([0, 1])], "index"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.index_put_((x > 0,), x[:2] + 1), "index_put_"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: torch.isin(x, torch.arange(20, device=DEVICE)), "isin"),
        (lambda x: x.tolist(), "copy_"),
        (lambda x: x.cpu(), "copy_"),
        (lambda x: x.to("cpu"), "copy_"),
        (lambda x: torch.zeros(3).copy_(x), "copy_"),
        (lambda x: x.copy_(torch.zeros(3), non_blocking=True), "copy_"),
        (lambda x: x.new_tensor([1, 2]), "_to_copy"),
        (lambda x: torch.tensor([1, 2], device=x.device), "_to_copy"),
        (lambda x: torch.zeros(3).to(DEVICE), "_to_copy"),
        (lambda x: torch.zeros(3).to(DEVICE, non_blocking=True), "_to_copy"),
        (lambda x: torch.zeros(3).pin_memory().to(DEVICE), "_to_copy"),
    ],
)
def test_what_waits_is_recorded_with_its_line(device: PretendedCuda, wait, operation: str) -> None:
    x = torch.tensor([1.0, 2.0, 0.0]).pin_memory().to(DEVICE, non_blocking=True)
    assert device.syncs == []
    wait(x)
    (event,) = device.syncs
    assert event.operation == operation
    assert (event.file, event.function) == ("test_pretended_cuda.py", "<lambda>")


def test_what_does_not_wait_is_not_recorded(device: PretendedCuda) -> None:
    x = torch.arange(6, device=DEVICE).float()
    rows = torch.tensor([1, 0, 2]).pin_memory()
    x[rows[1:].to(DEVICE, non_blocking=True)] = 0.0
    x.to("cpu", non_blocking=True)
    x.repeat_interleave(torch.ones_like(x).long(), output_size=6)
    torch.isin(x, x[:5])
    x.topk(2).values.sort().values.cumsum(0).double().to(torch.bfloat16).new_full((2,), 3)
    assert device.syncs == []
    assert device.operations["aten.topk"] == 1


def test_what_adds_in_any_order_is_recorded(device: PretendedCuda) -> None:
    x, places = torch.zeros(3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x.index_add_(0, places, torch.ones(2, device=DEVICE))
    x.scatter_add(0, places, torch.ones(2, device=DEVICE))
    assert operations(device.nondeterministic) == ["index_add_", "scatter_add"]
    device.clear()
    places.index_add_(0, places.clone(), places.clone())  # whole numbers
    x.sum()
    assert device.nondeterministic == []
    assert device.operations["aten.sum"] == 1


def test_autocast_is_that_of_the_claimed_device(device: PretendedCuda) -> None:
    x = torch.ones(2, 2, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32


def test_it_ends_with_its_context() -> None:
    with pretended_cuda():
        x = torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside of pretended_cuda"):
        x + 1
    assert torch.tensor([1.0]).device.type == "cpu"
    assert torch.ones(1).tolist() == [1]
