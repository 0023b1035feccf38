"""One SAE's step by itself: how it begins, what it counts, and that micro-batches, parts and files change nothing."""

import math

import pytest
import torch
from hf_msae.modeling import sparse_encoder
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.learner import Learner, make_learners
from hf_msae.training.learner_files import read_learner, write_model, write_state
from hf_msae.training.run import Run
from hf_msae.training.schedules import Length

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")
SAE_OPTIONS = ("k", "prefix_sampling", "log_loss", "inner_decoder_share", "inner_activation_share", "p_end", "aligned")
SITE = Site("layers.0")
# Parents without their children: held back from step 4 on, sorted before step 6.
HELD_BACK = {"inner_decoder_share": 0.0, "inner_activation_share": 0.25, "inner_share_start": 4}
SORTED = {"sort_latents_at": 6}
# p falls before steps 2, 8 and 14, and is compared with the next one in the three steps before each.
ANNEALED = {"activation": "relu", "p_end": 0.2}
ANNEALED |= {"p_anneal_start": 2, "n_sparsity_updates": 3, "sparsity_queue_length": 3}


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Activations (96, 16) with a mean and a scale that are not those of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return [3 + 5 * torch.randn(96, 16, generator=generator) for _ in range(count)]


def make_learner(activation: str = "batch_topk", max_steps: int = 20, sharded: bool = False, **changes) -> Learner:
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 24, 64], "k": 4, "activation": activation}
    sae_options = {name: changes.pop(name) for name in list(changes) if name in SAE_OPTIONS}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(options | sae_options)))
    settings = {"per_device_train_batch_size": 96, "use_cpu": True, "shard_latents": sharded} | changes
    run = Run(SAETrainingArguments(**settings))
    return make_learners(run, {"sae": sae}, {"sae": SITE}, Length(max_steps))[0]


def train(learner: Learner, steps: range, seed: int = 0) -> Learner:
    given = batches(steps.stop, seed)
    if steps.start == 0:
        learner.start(given[0])
    for step in steps:
        learner.step(given[step], step)
    return learner


def test_it_begins_at_the_mean_with_unit_rows_and_steps_in_activation_units():
    learner = make_learner()
    (x,) = batches(1)
    learner.start(x)
    assert torch.allclose(learner.sae.b_dec, x.mean(0), atol=1e-6)
    assert torch.allclose(learner.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert all(moment.eq(0).all() for moment in learner.moments.values())  # the first step counts them
    weights, biases = (group["peak_lr"] for group in learner.optimizer.param_groups)
    assert weights == learner.learning_rate
    assert biases == pytest.approx(learner.learning_rate * x.double().var(0, correction=0).mean().sqrt().item())


def test_a_step_before_the_start_is_refused():
    with pytest.raises(RuntimeError, match=r"before Learner\.start"):
        make_learner().step(batches(1)[0], 0)


@pytest.mark.parametrize("seen", [1, 4])
def test_the_variance_is_that_of_all_activations_so_far(seen):
    learner = train(make_learner(), range(seen))
    x = torch.cat(batches(seen)).double()
    assert learner.variance.item() == pytest.approx((x - x.mean(0)).pow(2).sum(1).mean().item())
    assert learner.moments["count"] == 96 * seen


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_counters_are_of_latents_that_were_active(activation):
    learner = train(make_learner(activation, dead_after_tokens=150, learning_rate=1e-9), range(4))
    given = batches(4)
    learner.sae.eval()
    silent = learner.silent_tokens
    assert set(silent.tolist()) <= {0, 96, 192, 288, 384}
    assert (silent == 0).any()
    log = learner.read_log()
    assert log["dead"] == pytest.approx((silent > 150).float().mean().item())
    if activation in ("batch_topk", "topk"):
        assert log["l0"] == pytest.approx(4, abs=0.2)
    assert len(log["level_losses"]) == 3
    assert log["level_losses"][0] > log["level_losses"][-1] > 0
    assert learner.read_log()["loss"] == 0  # nothing since
    assert torch.isfinite(given[0]).all()


def test_the_default_for_dead_latents_is_a_twentieth_of_a_short_run():
    assert make_learner(max_steps=1000).dead_after == 1000 * 96 // 20
    assert make_learner(max_steps=4).dead_after == 96
    assert make_learner(max_steps=10**7).dead_after == 10_000_000
    assert make_learner(max_steps=1000, gradient_accumulation_steps=2).dead_after == 1000 * 2 * 96 // 20


def assert_nearly_the_same(one: Learner, other: Learner) -> None:
    """Adam's steps have a fixed size, so a rounding error shows where a gradient is nearly nothing."""
    for (name, mine), its in zip(one.sae.named_parameters(), other.sae.parameters(), strict=True):
        assert ((mine - its).abs() > 1e-3 * its.abs().max()).float().mean() < 0.02, name


FORMS = {
    "log_loss": {"log_loss": True},
    "pareto": {"prefix_sampling": "pareto"},
    "held back": HELD_BACK | {"inner_share_start": 2},
    "sorted": SORTED | {"sort_latents_at": 3},
    "p annealed": ANNEALED,
    "aligned": {"aligned": True},
}


@pytest.mark.parametrize("form", [*ACTIVATIONS, *FORMS])
def test_micro_batches_are_one_batch(form):
    options = FORMS.get(form, {})
    options = {"activation": form} if form in ACTIVATIONS else options
    whole = train(make_learner(**options), range(6))
    sizes = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 4}
    parts = train(make_learner(**sizes, **options), range(6))
    assert_nearly_the_same(parts, whole)
    ours, theirs = parts.read_log(), whole.read_log()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_latents_as_a_single_part_are_the_whole(activation):
    whole, part = train(make_learner(activation), range(6)), train(make_learner(activation, sharded=True), range(6))
    assert part.rows == slice(0, 64)
    assert_nearly_the_same(part, whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_single_part_is_held_back_and_sorted_as_the_whole_is(activation):
    settings = HELD_BACK | SORTED | {"inner_share_start": 1, "sort_latents_at": 3}
    whole = train(make_learner(activation, **settings), range(6))
    assert_nearly_the_same(train(make_learner(activation, sharded=True, **settings), range(6)), whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_held_back_gradients_change_nothing_before_their_step(activation):
    plain, held = (make_learner(activation, **settings) for settings in ({}, HELD_BACK))
    for step, x in enumerate(batches(8)):
        if step == 0:
            plain.start(x), held.start(x)
        plain.step(x, step), held.step(x, step)
        assert torch.equal(plain.sae.W_dec, held.sae.W_dec) == (step < 4)
        assert torch.equal(plain.sae.W_enc, held.sae.W_enc) == (step < 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sorting_moves_latents_and_all_that_belongs_to_them(activation):
    """Put back into the old order, everything has the bits that it had before."""
    learner = train(make_learner(activation, **SORTED), range(6))
    before = {name: value.clone() for name, value in (learner.sae.state_dict() | learner.latent_state()).items()}
    assert before["energies"].sum() > 0
    learner._sort_latents()
    after = learner.sae.state_dict() | learner.latent_state()
    assert (after["energies"].diff() <= 0).all()
    order = before["energies"].argsort(descending=True, stable=True)
    assert not torch.equal(order, order.sort().values)
    for name, value in after.items():
        assert torch.equal(value, before[name] if name == "b_dec" else before[name][order]), name


def test_latents_are_sorted_by_their_squared_activations():
    learner = train(make_learner("topk", learning_rate=1e-12, sort_latents_at=6), range(6))
    learner.sae.train()
    f = learner.sae.encode(torch.cat(batches(6)[3:])).double()
    torch.testing.assert_close(learner.energies, f.square().sum(0).detach(), rtol=1e-4, atol=1e-4)
    learner.step(batches(7)[6], 6)
    again = learner.sae.encode(torch.cat(batches(6)[3:])).double().square().sum(0)
    assert (again.diff() <= 1e-3 * again.max()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("saved_after", [2, 5, 8], ids=["before", "between", "after"])
def test_what_is_written_goes_on_to_the_same_bits(tmp_path, activation, sharded, saved_after):
    """Also across the step from which gradients are held back, and that before which latents are sorted."""
    settings = {"sharded": sharded, "k_anneal_steps": 8, "dead_after_tokens": 100} | HELD_BACK | SORTED
    whole = train(make_learner(activation, **settings), range(10))
    half = train(make_learner(activation, **settings), range(saved_after))
    write_model(half, tmp_path)
    write_state(half, tmp_path)
    resumed = make_learner(activation, **settings)
    read_learner(resumed, tmp_path)
    train(resumed, range(saved_after, 10))
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name
    assert torch.equal(resumed.silent_tokens, whole.silent_tokens)
    assert resumed.read_log() == whole.read_log()
    assert load_file(tmp_path / "model.safetensors")["W_dec"].shape == (64, 16)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("saved_after", [1, 6, 8, 12])
def test_annealing_goes_on_where_it_was(tmp_path, sharded, saved_after):
    """Also from the middle of the steps over which penalties are compared, and from just before p changes."""
    settings = {"sharded": sharded, "dead_after_tokens": 100} | ANNEALED
    whole = train(make_learner(**settings), range(16))
    half = train(make_learner(**settings), range(saved_after))
    write_model(half, tmp_path)
    write_state(half, tmp_path)
    resumed = make_learner(**settings)
    read_learner(resumed, tmp_path)
    train(resumed, range(saved_after, 16))
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name
    assert resumed.sparsity_weight == whole.sparsity_weight
    assert torch.equal(resumed.penalties, whole.penalties)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_aligned_rows_stay_aligned_and_go_on_where_they_were(tmp_path, activation, sharded):
    """Also where latents change places, before step 6; and the weights are written as any others."""
    settings = {"activation": activation, "sharded": sharded, "aligned": True, "dead_after_tokens": 100} | SORTED
    whole = make_learner(**settings)
    whole.start(batches(1)[0])
    torch.testing.assert_close(whole.sae.W_enc, whole.sae.W_dec, rtol=0, atol=1e-6)
    for step, x in enumerate(batches(10)):
        whole.step(x, step)
        torch.testing.assert_close((whole.sae.W_enc * whole.sae.W_dec).sum(1), torch.ones(64), rtol=0, atol=1e-5)
    assert not torch.allclose(whole.sae.W_enc, whole.sae.W_dec, atol=1e-3)
    half = train(make_learner(**settings), range(5))
    write_model(half, tmp_path)
    write_state(half, tmp_path)
    resumed = make_learner(**settings)
    read_learner(resumed, tmp_path)
    train(resumed, range(5, 10))
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["W_enc"], half.sae.W_enc)
    loaded, part = MatryoshkaSAE.from_pretrained(tmp_path), MatryoshkaSAE.from_pretrained(tmp_path, prefix=24)
    x = batches(1)[0]
    assert torch.equal(loaded.encode(x), half.sae.eval().encode(x))
    assert torch.equal(part.encode(x), loaded.truncate(24).encode(x))
    assert part.config.aligned


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_the_penalty_is_as_strong_after_p_changed_as_before(monkeypatch, path):
    """The weight changes by the ratio of the penalties with both p over the steps before, and by nothing else."""
    monkeypatch.setattr("hf_msae.training.learner.CONTROLLER_RATE", 0.0)
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0 if path == "sparse" else -1.0)
    learner = make_learner(**ANNEALED, learning_rate=1e-12)
    given, weights, penalties = batches(16), [], []
    for step, x in enumerate(given):
        train(learner, range(step, step + 1))
        weights.append(learner.sparsity_weight.item())
        deviation = learner.variance.float().sqrt()
        with torch.no_grad():
            units = torch.relu(learner.sae.pre_activations(x)) / deviation
        powers = [units[units > 0] if p == 1 else (units[units > 0] + 1e-3) ** p for p in (1, 11 / 15, 7 / 15, 0.2)]
        penalties.append([power.double().sum().item() / 96 for power in powers])
    expected = 0.01
    for number, change in enumerate((2, 8, 14)):
        window = penalties[max(0, change - 3) : change]
        assert weights[change - 1] == pytest.approx(expected, rel=1e-4)
        expected *= sum(each[number] for each in window) / sum(each[number + 1] for each in window)
        assert weights[change] == pytest.approx(expected, rel=1e-4)
    assert weights[-1] == pytest.approx(expected, rel=1e-4)


def test_the_first_bad_step_is_kept():
    learner = train(make_learner(), range(2))
    assert learner.bad_step == -1
    learner.step(torch.full((96, 16), math.nan), 2)
    learner.step(batches(1)[0], 3)
    assert learner.bad_step == 2


def test_it_leaves_a_model_for_readers():
    learner = train(make_learner(), range(2))
    assert learner.sae.training
    learner.finish()
    assert not learner.sae.training
    assert learner.sae.gradient_memory is None
