"""The fused step against Adam, clipping and normalisation done one after another."""

import copy

import pytest
import torch

from hf_msae.training.optimization import DictionaryAdam, align_rows, default_learning_rate


def make_parameters(seed: int) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator))  # noqa: E731
    parameters = {"rows": draw(37, 5), "encoder": draw(37, 5), "bias": draw(37)}
    with torch.no_grad():
        parameters["rows"].div_(parameters["rows"].norm(dim=-1, keepdim=True))
    return parameters


def set_gradients(parameters, step: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def groups(parameters):
    return [
        {"params": [parameters["rows"], parameters["encoder"]], "lr": 1e-2},
        {"params": [parameters["bias"]], "lr": 3e-2},
    ]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("chunk", [7, 1 << 19], ids=["many chunks", "one chunk"])
def test_equals_adam_with_projection_clipping_and_normalisation(monkeypatch, max_grad_norm, chunk):
    monkeypatch.setattr("hf_msae.training.optimization.CPU_CHUNK", chunk)
    ours, theirs = make_parameters(0), make_parameters(0)
    fused = DictionaryAdam(groups(ours), ours["rows"], max_grad_norm, betas=(0.9, 0.98))
    plain = torch.optim.Adam(groups(theirs), betas=(0.9, 0.98))
    for step in range(5):
        set_gradients(ours, step, 0.7)
        set_gradients(theirs, step, 0.7)
        fused.step()
        with torch.no_grad():
            rows = theirs["rows"]
            rows.grad -= (rows.grad * rows).sum(-1, keepdim=True) * rows
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        plain.step()
        with torch.no_grad():
            rows.div_(rows.norm(dim=-1, keepdim=True))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-6)
    assert fused.state[ours["rows"]]["step"] == 5


def test_rows_keep_norm_one():
    parameters = make_parameters(1)
    fused = DictionaryAdam(groups(parameters), parameters["rows"], 1.0)
    for step in range(20):
        set_gradients(parameters, step, 100.0)
        fused.step()
    assert torch.allclose(parameters["rows"].norm(dim=-1), torch.ones(37), atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_aligned_encoder_is_learnt_as_its_definition_is(max_grad_norm):
    """Encoder rows d + r - (r·d)d, by autograd of any loss, against the rows that are stored and their gradients."""
    ours, theirs = make_parameters(0), make_parameters(0)
    align_rows(ours["encoder"], ours["rows"])
    mixing = torch.randn(37, 5, generator=torch.Generator().manual_seed(9))

    def loss(encoder, rows, bias):
        return ((encoder * mixing).sin().sum(-1) * (rows.cos().sum(-1) + bias)).sum()

    fused = DictionaryAdam(groups(ours), ours["rows"], max_grad_norm, aligned_rows=ours["encoder"], betas=(0.9, 0.98))
    plain = torch.optim.Adam(groups(theirs), betas=(0.9, 0.98))
    rest, rows = theirs["encoder"], theirs["rows"]  # the remainder, of which only what is across the rows counts
    for _ in range(8):
        fused.zero_grad(), plain.zero_grad()
        loss(ours["encoder"], ours["rows"], ours["bias"]).backward()
        fused.step()
        with torch.no_grad():
            rest.sub_((rest * rows).sum(-1, keepdim=True) * rows)
        loss(rows + rest - (rest * rows).sum(-1, keepdim=True) * rows, rows, theirs["bias"]).backward()
        with torch.no_grad():
            rows.grad -= (rows.grad * rows).sum(-1, keepdim=True) * rows
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
            plain.step()
            rows.div_(rows.norm(dim=-1, keepdim=True))
            encoder = rows + rest - (rest * rows).sum(-1, keepdim=True) * rows
        torch.testing.assert_close(ours["rows"], rows, rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(ours["encoder"], encoder, rtol=2e-5, atol=5e-6)
        torch.testing.assert_close((ours["encoder"] * ours["rows"]).sum(-1), torch.ones(37))


def test_its_state_goes_on_where_it_was():
    parameters = make_parameters(2)
    fused = DictionaryAdam(groups(parameters), parameters["rows"], 1.0)
    set_gradients(parameters, 0, 1.0)
    fused.step()
    again = {name: torch.nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    resumed = DictionaryAdam(groups(again), again["rows"], 1.0)
    resumed.load_state_dict(copy.deepcopy(fused.state_dict()))
    for each, optimizer in ((parameters, fused), (again, resumed)):
        set_gradients(each, 1, 1.0)
        optimizer.step()
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)


def test_without_gradients_it_says_so():
    parameters = make_parameters(3)
    with pytest.raises(RuntimeError, match="needs gradients"):
        DictionaryAdam(groups(parameters), parameters["rows"], 1.0).step()


# Schedules


def test_default_learning_rate_passes_through_its_two_anchors():
    assert default_learning_rate(1024, 730) == pytest.approx(1e-2)
    assert default_learning_rate(1024, 10) == pytest.approx(1e-2)  # a short run is no reason for larger steps
    assert default_learning_rate(65_536, 244_000) == pytest.approx(3e-4, rel=0.05)
    assert default_learning_rate(4096, 730) == pytest.approx(default_learning_rate(1024, 730) / 2)
