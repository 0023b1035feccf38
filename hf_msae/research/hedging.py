"""Hedging degree: how far the latents of an SAE change when it gets more of them (arXiv:2505.11756).

An SAE that is too narrow for a feature leaves it in the latents of correlated features, because that lowers the
squared error. Give it room, and those latents let go: they move along directions that the new latents take over. So
the instrument widens a trained SAE by N latents, trains on, and compares with a control that trains on as it is. With
δ = the extended SAE's first n decoder rows minus the control's,

    p = mean‖projection of δ onto the span of the new rows‖ / mean‖control's rows‖
    b = the same with random subspaces of N dimensions (mean of 50)
    degree = max(0, (p − b) / (1 − b)).

The baseline is what any drift at all would show by chance; it grows with N/d, and with N ≥ d the span is everything
and the degree says nothing. What the paper's code does was read; the text was not, so the settings here are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Table
from hf_msae.evaluation.tables import labelled_methods, write_cell
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.meta import fit_rows
from hf_msae.research.subjects import trained_saes
from hf_msae.training import SAETrainingArguments
from hf_msae.training.optimization import default_learning_rate

DRAWS = 50
# New encoder rows start as this times their decoder rows, as all rows do when training begins.
NEW_ENCODER_SCALE = 0.3
# Of the trainings of a report.
REPORT_STEPS, REPORT_BATCH = 200, 2048


@dataclass(frozen=True)
class HedgingDegree:
    """The degree, and what it is made of.

    Args:
        prefix: the latents it is of.
        degree: in [0, 1].
        projection: p, the part of the drift within the new rows' span.
        baseline: b, the same with random subspaces, a mean over `DRAWS`.
        baseline_spread: standard deviation of these.
        drift: mean‖δ‖ over the mean norm of the control's rows.
        num_new: latents that were added.
    """

    prefix: int
    degree: float
    projection: float
    baseline: float
    baseline_spread: float
    drift: float
    num_new: int


def hedging_degree(
    extended: Tensor, control: Tensor, *, new: Tensor | None = None, draws: int = DRAWS, seed: int = 0
) -> HedgingDegree:
    """The degree from decoder rows of both SAEs.

    Args:
        extended: rows (m, d) of the SAE that was widened; the first n correspond to those of `control`.
        control: rows (n, d).
        new: the new rows (N, d); those of `extended` after the first n by default.
        draws: random subspaces behind the baseline.
        seed: of these.

    Raises:
        InputError: there are no new rows, or so many that they span everything.
    """
    new = extended[len(control) :] if new is None else new
    width = control.shape[1]
    if not 1 <= len(new) < width or len(extended) < len(control) or extended.shape[1] != width:
        raise InputError(
            f"Expected from 1 to {width - 1} new rows (fewer than the {width} dimensions, or their span is "
            f"everything), of the width of the control's {tuple(control.shape)}; got {tuple(extended.shape)} with "
            f"{len(new)} new ones."
        )
    control = control.double().cpu()
    delta = extended[: len(control)].double().cpu() - control
    scale = control.norm(dim=1).mean().item()
    generator = torch.Generator().manual_seed(seed)
    by_chance = torch.tensor(
        [
            _projected(delta, torch.randn(len(new), width, generator=generator, dtype=torch.float64)) / scale
            for _ in range(draws)
        ],
        dtype=torch.float64,
    )
    projection, baseline = _projected(delta, new.double().cpu()) / scale, by_chance.mean().item()
    return HedgingDegree(
        prefix=len(control),
        degree=max(0.0, (projection - baseline) / (1 - baseline)) if baseline < 1 else 0.0,
        projection=projection,
        baseline=baseline,
        baseline_spread=by_chance.std(correction=0).item(),
        drift=delta.norm(dim=1).mean().item() / scale,
        num_new=len(new),
    )


def _projected(delta: Tensor, rows: Tensor) -> float:
    """Mean norm of the projections of delta (n, d) onto the span of rows (N, d)."""
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[singular > singular[0] * 1e-10]
    return (delta @ basis.T).norm(dim=1).mean().item()


def measure_hedging(
    text: TextActivations,
    sae: MatryoshkaSAE,
    *,
    num_new: int | None = None,
    max_steps: int = 300,
    batch_size: int = 2048,
    learning_rate: float | None = None,
    seed: int = 0,
    use_cpu: bool = False,
) -> list[HedgingDegree]:
    """Train on with and without new latents, and give the degree of every prefix of the SAE.

    Both trainings see the same batches of the same activations, of which those of the SAE's own training are best. The
    new latents widen the last level. An inner level's own loss stays what it was, so its latents have little reason to
    let go: how far a prefix hedges is shown by that prefix by itself, `sae.truncate(m)`.

    Args:
        text: activations of the SAE's site.
        sae: a trained one.
        num_new: by default an eighth of the width of the activations.
        max_steps: of either training.
        batch_size: activations in a step.
        learning_rate: by default a tenth of what training from the beginning would take: the SAE is trained already.
        seed: of the new latents, the batches and the baseline.
        use_cpu: whether to train on the CPU even where there is an accelerator.

    Raises:
        InputError: there are fewer activations than a batch, or [`hedging_degree`] refuses the numbers.
    """
    width = sae.config.hidden_size
    num_new = num_new or max(1, width // 8)
    if text.x.shape[1] != width:
        raise InputError(f"The SAE reads activations of {width} dimensions, but these have {text.x.shape[1]}.")
    if not 1 <= num_new < width:
        raise InputError(f"num_new must be from 1 to {width - 1}, fewer than the {width} dimensions; got {num_new}.")
    if text.num_tokens < batch_size:
        raise InputError(
            f"There are {text.num_tokens:,} activations, fewer than one batch of {batch_size:,}; give more tokens or "
            "a smaller batch_size."
        )
    args = SAETrainingArguments(
        output_dir="",
        init_from=sae.config.name_or_path or "memory",
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate or default_learning_rate(sae.config.num_latents, max_steps) / 10,
        seed=seed,
        use_cpu=use_cpu,
    )
    control, extended = widen(sae, 0, seed), widen(sae, num_new, seed)
    for model, what in ((control, "Hedging: control"), (extended, "Hedging: wider")):
        fit_rows(model, text.x, args, text.site, what)
    rows = extended.W_dec.detach()
    new = rows[sae.config.num_latents :]
    return _of_prefixes(rows, control.W_dec.detach(), new, sae.config.prefix_sizes, seed)


def _of_prefixes(
    extended: Tensor, control: Tensor, new: Tensor, prefix_sizes: Sequence[int], seed: int
) -> list[HedgingDegree]:
    return [hedging_degree(extended[:size], control[:size], new=new, seed=seed) for size in prefix_sizes]


@torch.no_grad()
def widen(sae: MatryoshkaSAE, num_new: int, seed: int = 0) -> MatryoshkaSAE:
    """A copy with further latents behind the others, in the last level.

    Their decoder rows are random unit rows, their encoder rows lie along them.

    Args:
        sae: the SAE.
        num_new: how many latents to add.
        seed: of the rows.
    """
    config = sae.config
    sizes = [*config.prefix_sizes[:-1], config.num_latents + num_new]
    values = config.to_dict() | {"num_latents": sizes[-1], "prefix_sizes": sizes, "measured": None}
    wider = MatryoshkaSAE(MatryoshkaSAEConfig(**values)).to(sae.device)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_new, config.hidden_size, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=1).to(sae.W_dec)
    state = dict(sae.state_dict())
    state["W_dec"] = torch.cat([state["W_dec"], directions])
    state["W_enc"] = torch.cat([state["W_enc"], NEW_ENCODER_SCALE * directions])
    for name in ("b_enc", "max_activation", "firing_rate"):
        state[name] = torch.cat([state[name], state[name].new_zeros(num_new)])
    mean_threshold = state["threshold"].mean().expand(num_new)
    state["threshold"] = torch.cat([state["threshold"], mean_threshold])
    wider.load_state_dict(state)
    return wider


class HedgingMetric(Metric[dict[str, list[HedgingDegree]]]):
    """How far the latents of each prefix change when they get company, by the SAE's name."""

    name = "hedging"
    takes_tokenized = False

    def measure(self, inputs: MetricInputs) -> dict[str, list[HedgingDegree]]:
        """Take each prefix of a trained SAE by itself, widen it and train on.

        Widening the last level would give an inner one no reason to let go.
        """
        return {
            name: [_measure_prefix(inputs, sae, prefix) for prefix in sae.config.prefix_sizes]
            for name, sae in trained_saes(inputs).items()
        }

    def tables(self, result: dict[str, list[HedgingDegree]], evaluation: Evaluation) -> list[Table]:
        """One, with a row for each method at each prefix."""
        if not result:
            return []
        rows = []
        for label, names in labelled_methods(evaluation, result).items():
            for prefix in dict.fromkeys(item.prefix for name in names for item in result[name]):
                of = [item for name in names for item in result[name] if item.prefix == prefix]
                fields = ("drift", "projection", "baseline", "degree")
                cells = [write_cell([vars(item)[field] for item in of], 4) for field in fields]
                rows.append([label, f"{prefix:,}", *cells])
        new = next(iter(result.values()))[0].num_new
        note = (
            f"Every prefix by itself gets {new} more latents and is trained on, as is a control without them. Drift: "
            "how far the old decoder rows then lie from the control's; projection: the part of it within the new "
            "rows' span; chance: within as many random directions. It depends on the steps and the rate: compare "
            "within this table."
        )
        return [Table("Hedging", note, ["SAE", "prefix", "drift", "projection", "chance", "degree"], rows)]


def _measure_prefix(inputs: MetricInputs, sae: MatryoshkaSAE, prefix: int) -> HedgingDegree:
    degrees = measure_hedging(
        inputs.text,
        sae.truncate(prefix),
        max_steps=REPORT_STEPS,
        batch_size=min(REPORT_BATCH, inputs.text.num_tokens),
        seed=inputs.seed,
        use_cpu=sae.device.type == "cpu",
    )
    return degrees[-1]
