"""One SAE being trained: its optimizer, its counters, its step.

A run has as many learners as SAEs and feeds them all from one pass of the language model. A learner touches no data
source and no file. What it accumulates between two log lines stays on the device, so that the training loop never
waits for it.

Losses are divided by the variance of the activations, and the biases, which alone live in activation units, get a
learning rate in those units (Adam makes a step of fixed size, so this equals training on activations scaled to unit
variance and folding the scale into the biases afterwards). That is why one set of defaults serves every model and
site.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_msae.data import TOKEN_IDS
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.dense_ops import ALL_GRADIENTS
from hf_msae.modeling.devices import constants, sent
from hf_msae.modeling.objective import BatchContext
from hf_msae.modeling.selection import SINGLE_PROCESS
from hf_msae.modeling.sparse_ops import GradientMemory
from hf_msae.modeling.untrusted import PER_LATENT
from hf_msae.sites import Site
from hf_msae.training.collectives import GradientSums
from hf_msae.training.end_to_end import EndToEnd
from hf_msae.training.initial_weights import InputScale, draw_token_vectors, draw_weights, sum_moments
from hf_msae.training.micro_batches import SAEBatch, batch_contexts
from hf_msae.training.optimization import DictionaryAdam, align_rows, default_learning_rate, make_optimizer
from hf_msae.training.precision import products
from hf_msae.training.run import Run
from hf_msae.training.schedules import (
    Length,
    annealed_k,
    annealed_p,
    counts_divergence,
    learning_rate_factor,
    next_p,
    passes_all_gradients,
    sample_prefix_sizes,
    sorting_steps,
)
from hf_msae.training.sharded import ShardedSAE
from hf_msae.training.step_graphs import StepGraphs
from hf_msae.training.step_statistics import LogSums, StepStatistics

# How fast the L0 controller of `relu` moves the sparsity weight: a relative change of 2% a step at twice the target.
CONTROLLER_RATE = 0.03
# Columns of a matrix whose rows change places at once.
SORTED_COLUMNS = 64


class Learner:
    """Trains one SAE on batches of activations.

    Args:
        name: What logs and folders call it.
        sae: The model; it is moved to the run's device, and its weights are overwritten by `start`.
        site: Where its activations come from.
        run: The run: arguments, processes, device.
        max_steps: Length of the run, for the schedules.
        extensions: (From step, steps in all) each time the run was given another length than `max_steps`.
        output_site: Where what it reconstructs comes from; `site` by default, as of an SAE.
        end_to_end: What has the language model's predictions count from the step that `kl_from` says.

    Attributes:
        data_parallel: The processes that have other tokens of the same batch. Where each process has some of the
            latents, every one has all tokens.
        learning_rate: The peak.
        rate: The learning rate of the latest step.
        dead_after: Tokens for which a dead latent was silent.
        silent_tokens: For each latent of this process, the tokens since it was last active, (n,) int64.
        energies: For each latent of this process, the sum of its squared activations over the steps that count for
            the order of latents, (n,) float64.
        bad_step: The first step whose loss was not finite, -1 for none; a scalar on the device.
    """

    def __init__(
        self,
        name: str,
        sae: MatryoshkaSAE,
        site: Site,
        run: Run,
        max_steps: int,
        extensions: tuple[tuple[int, int], ...] = (),
        output_site: Site | None = None,
        end_to_end: EndToEnd | None = None,
    ) -> None:
        sae.to(run.device)  # type: ignore[arg-type]  # transformers hides the signature
        self.name, self.sae, self.site, self.output_site = name, sae.train(), site, output_site or site
        self.args, self.device, self.max_steps, self.extensions = run.args, run.device, max_steps, extensions
        self.end_to_end = end_to_end
        if self.device.type == "cpu":
            sae.gradient_memory = GradientMemory()
        self.data_parallel = SINGLE_PROCESS if isinstance(sae, ShardedSAE) else run.processes
        args, config, device = self.args, sae.config, self.device
        self.learning_rate = args.learning_rate or default_learning_rate(config.num_latents, max_steps)
        self.rate = 0.0
        self.dead_after = args.dead_after_tokens or _default_dead_after(run.tokens_per_step, max_steps)
        double: dict[str, Any] = {"dtype": torch.float64, "device": device}
        # Everything below is what a checkpoint must hold besides the weights.
        self.moments = {"count": torch.zeros((), **double), "square": torch.zeros((), **double)}
        self.moments["sum"] = torch.zeros(config.output_size, **double)
        self.silent_tokens = torch.zeros(sae.W_dec.shape[0], dtype=torch.int64, device=device)
        self.energies = torch.zeros(sae.W_dec.shape[0], **double)
        self.sparsity_weight = torch.full((), float(config.sparsity_weight), device=device)
        # The penalty over the last steps before its p changes: with the p that was, and with the one that comes.
        self.penalties = torch.zeros(2, **double)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.optimizer: DictionaryAdam | None = None
        self.log = LogSums(config.num_levels, device)
        self.graphs = StepGraphs(sae, run.graph_pool) if args.cuda_graphs else None

    # Beginning

    @torch.no_grad()
    def start(self, activations: Tensor, target: Tensor | None = None, token_ids: Tensor | None = None) -> None:
        """Initialise weights, variance and step sizes; the decoder bias begins at the mean of what it is to give.

        Weights that came with `init_from` stay.

        Args:
            activations: This process's first activations, (n, hidden_size).
            target: Of a transcoder, what it is to reconstruct of them, (n, output_size).
            token_ids: Of a tokenized SAE, the token of each, (n,).
        """
        batch = SAEBatch(activations, target, token_ids).map(self._of_all)
        x, y = batch.x, batch.wanted
        self._update_moments(y)
        transcoder = None
        if target is not None:
            transcoder = InputScale.of(x, self.variance, self.sae.config, self.data_parallel)
        if self.args.init_from is None:
            draw_weights(self.sae, self.moments["sum"] / self.moments["count"], self.args.seed, self.rows, transcoder)
            if batch.token_ids is not None:
                draw_token_vectors(self.sae, y, batch.token_ids, self.data_parallel)
            if self.sae.config.activation == "jumprelu":
                # Without this the first steps are dense: a threshold learns only from pre-activations near it.
                self.sae.threshold.fill_(1.0)
                self.sae.calibrate_threshold([x], self.data_parallel)
        if self.sae.config.aligned:
            align_rows(self.sae.W_enc, self.sae.W_dec)
        self.optimizer = self._make_optimizer(1.0 if transcoder is None else transcoder.gain)
        for moment in self.moments.values():
            moment.zero_()  # the first step counts these activations again

    def _of_all(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch, or, where each process has some of the latents, those of all processes."""
        x = rows.to(self.device)
        return x if self.sae.ranks.size == 1 else self.sae.ranks.gather(x).flatten(0, 1)

    def _make_optimizer(self, gain: float = 1.0) -> DictionaryAdam:
        return make_optimizer(self.sae, self.args, self.learning_rate, self.variance.item(), gain)

    @property
    def rows(self) -> slice:
        """The latents that this process has."""
        return slice(self.sae.first_latent, self.sae.first_latent + self.sae.W_dec.shape[0])

    @property
    def variance(self) -> Tensor:
        """Running total variance of what is reconstructed, E‖y - E y‖², scalar float64."""
        mean = self.moments["sum"] / self.moments["count"]
        variance = self.moments["square"] / self.moments["count"] - mean.pow(2).sum()
        return variance.clamp_min(1e-12)

    def _update_moments(self, x: Tensor) -> None:
        for name, part in zip(("sum", "square", "count"), sum_moments(x, self.data_parallel), strict=True):
            self.moments[name] += part

    # One step

    def finish(self) -> None:
        """Give back what only training needs."""
        self.sae.gradient_memory = None
        self.sae.eval()

    def step(
        self, activations: Tensor, step: int, target: Tensor | None = None, token_ids: Tensor | None = None
    ) -> None:
        """Take one optimizer step.

        Args:
            activations: This process's, of all micro-batches, (batch, hidden_size).
            step: Its number, from 0.
            target: Of a transcoder, what it is to reconstruct of them, (batch, output_size).
            token_ids: Of a tokenized SAE, the token of each, (batch,).
        """
        with products(self.args, self.device):
            self._step(SAEBatch(activations, target, token_ids).map(self._of_all), step)

    def take(self, batch: Mapping[Site, Tensor], step: int) -> None:
        """Take one optimizer step with a batch of all sites; the first begins with `start`.

        Args:
            batch: This process's activations by site, and for a tokenized SAE their `TOKEN_IDS`.
            step: Its number, from 0.
        """
        own = self.own_part(batch)
        if step == 0:
            self.start(own.x, own.target, own.token_ids)
        self.step(own.x, step, own.target, own.token_ids)

    @property
    def needed(self) -> list[Site]:
        """What a batch must hold for this SAE."""
        tokens = [TOKEN_IDS] if self.sae.config.is_tokenized else []
        return list(dict.fromkeys([self.site, self.output_site, *tokens]))

    def own_part(self, batch: Mapping[Site, Tensor]) -> SAEBatch:
        """What of a batch this SAE reads.

        Args:
            batch: Activations by site.
        """
        config = self.sae.config
        target = batch[self.output_site] if config.is_transcoder else None
        return SAEBatch(batch[self.site], target, batch[TOKEN_IDS] if config.is_tokenized else None)

    def _step(self, batch: SAEBatch, step: int) -> None:
        """`batch` has the rows of all processes where each has some of the latents."""
        config = self.sae.config
        if self.optimizer is None:
            raise RuntimeError("Learner.step was called before Learner.start.")
        config.measured = None  # it was of the weights before this step
        sorting = sorting_steps(self.max_steps, self.args)
        if step == sorting.stop:
            self._sort_latents()
        batch = batch.map(lambda rows: rows.float() if rows.is_floating_point() else rows)
        self._update_moments(batch.wanted)
        self._adapt_sparsity_weight(step)
        options: dict[str, Any] = {
            "dead_latents": self.silent_tokens > self.dead_after,
            "prefix_sizes": None,
            "variance": self.variance.float(),
            "k": annealed_k(step, self.max_steps, config, self.args),
            "sparsity_weight": self.sparsity_weight,
            "sparsity_p": annealed_p(step, self.max_steps, config, self.args),
            "inner_shares": ALL_GRADIENTS if passes_all_gradients(step, self.max_steps, self.args) else None,
            "return_latents": False,
        }
        if config.prefix_sampling == "pareto":
            options["prefix_sizes"] = sample_prefix_sizes(step, config, self.args.seed)
        factor = learning_rate_factor(step, self.max_steps, self.args, self.extensions)
        rates = [group["peak_lr"] * factor for group in self.optimizer.param_groups]
        self.rate = rates[0]
        diverges = self.end_to_end is not None and counts_divergence(step, self.max_steps, self.args, self.extensions)
        if self.graphs is not None and not diverges:
            with self._autocast():
                active = self.sae.select(batch.x, options["k"], options["variance"])
            assert active is not None  # as `check_graphs` saw to it
            compute = partial(self._compute, sorts=step in sorting)
            rates_there = sent(torch.tensor(rates), self.device)
            statistics = self.graphs.run(batch, active, options, rates_there, compute, kind=step in sorting)
        else:
            parts = batch.split(-(-len(batch) // self.args.gradient_accumulation_steps))
            with self._autocast():
                contexts = batch_contexts(self.sae, batch, parts, options, self.data_parallel)
            later_p = next_p(step, self.max_steps, config, self.args)
            kind: dict[str, Any] = {"sorts": step in sorting, "later_p": later_p, "diverges": diverges}
            statistics = self._compute(parts, contexts, options, rates, **kind)
        self._after_step(statistics, len(batch) * self.data_parallel.size, step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.args.bf16))

    def _compute(
        self,
        parts: Sequence[SAEBatch],
        contexts: Sequence[BatchContext],
        options: Mapping[str, Any],
        rates: Sequence[Tensor | float],
        sorts: bool,
        later_p: float | None = None,
        diverges: bool = False,
    ) -> StepStatistics:
        """Compute gradients of all micro-batches, and take the optimizer's step with its groups' learning rates.

        Kinds of steps also measure latents' energies (`sorts`), or the penalty with the next p, or count the language
        model's predictions.
        """
        assert self.optimizer is not None
        counted = (sorts, later_p is not None)
        statistics = StepStatistics(self.silent_tokens.shape[0], self.sae.config.num_levels, self.device, *counted)
        num_tokens = sum(map(len, parts))
        sums, level_losses = GradientSums(self.sae.parameters(), self.data_parallel), []
        for left, part, context in zip(reversed(range(len(parts))), parts, contexts, strict=True):
            with self._autocast():
                output = self.sae(part.x, target=part.target, token_ids=part.token_ids, batch=context, **options)
            weight = len(part) / (num_tokens * self.data_parallel.size)
            with nullcontext() if left or diverges else sums.begun_early():
                (output.loss * weight).backward()
            later = None
            if later_p is not None:
                later = self.sae.sparsity_at(output.active, output.latents, len(part), options["variance"], later_p)
            statistics.add(output, weight, later)
            level_losses.append(weight * output.level_losses)
        if diverges:
            self._add_divergence(torch.stack(level_losses).sum(0), options)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        sums.finish()
        if isinstance(self.sae, ShardedSAE):
            self.sae.collect_bias_gradient()
        self.optimizer.step()
        self._drop_gradients()
        return statistics

    def _add_divergence(self, level_losses: Tensor, options: Mapping[str, Any]) -> None:
        """Have the language model's predictions count in this step, as much as the levels' mean errors (G,) do."""
        assert self.end_to_end is not None
        config = self.sae.config
        if config.log_loss:  # as there, the divergence's gradient is divided by the divergence alone
            error = level_losses.new_tensor(1 / self.data_parallel.size)
        elif options["prefix_sizes"] is not None:
            error = level_losses.mean()
        else:
            error = (level_losses * constants(config.normalized_level_weights, level_losses)).sum()
        sites = (self.site, self.output_site)
        divergence = self.end_to_end.add_gradients(self.sae, sites, options, error, self.data_parallel)
        self.log.add_divergence(divergence)

    def _drop_gradients(self) -> None:
        if self.sae.gradient_memory is not None:
            self.sae.gradient_memory.keep(self.sae.parameters())
        elif self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _after_step(self, statistics: StepStatistics, num_tokens: int, step: int) -> None:
        """`num_tokens` are those of all processes."""
        if self.sae.config.activation == "jumprelu":
            self.sae.threshold.clamp_(min=0)
        counts, bad, losses, levels, energies, penalties = statistics.reduce(self.data_parallel)
        if energies.numel():
            self.energies += energies
        if penalties.numel():
            self.penalties += penalties
        self.silent_tokens += num_tokens
        self.silent_tokens[counts > 0] = 0
        l0 = self.sae.ranks.sum(counts.sum()) / num_tokens
        if self.sae.config.activation == "relu":
            self.sparsity_weight *= (l0 / self.sae.config.k).clamp(0.5, 2).float() ** CONTROLLER_RATE
        self.bad_step = torch.where((self.bad_step < 0) & (bad > 0), step, self.bad_step)
        self.log.add(losses, l0, levels)

    @torch.no_grad()
    def _adapt_sparsity_weight(self, step: int) -> None:
        """Where the penalty has another p from this step on, give it the weight with which it is as strong as before.

        (Coefficient annealing, arXiv:2408.00113.) Where nothing was active, the weight stays.
        """
        last, p = (annealed_p(at, self.max_steps, self.sae.config, self.args) for at in (step - 1, step))
        if p != last:
            before, after = self.penalties
            ratio = torch.where((before > 0) & (after > 0), before / after, 1.0)
            self.sparsity_weight *= ratio.float()
            self.penalties.zero_()

    @torch.no_grad()
    def _sort_latents(self) -> None:
        """Put the latents with the largest energies first, with all that a checkpoint holds of them."""
        sae = self.sae
        energies = sae.gather_rows(self.energies) if isinstance(sae, ShardedSAE) else self.energies
        order = energies.argsort(descending=True, stable=True)
        rows = [tensor for name, tensor in sae.state_dict().items() if name in PER_LATENT]
        rows += [self.silent_tokens, self.energies]
        for name, parameter in sae.named_parameters():
            if name in PER_LATENT:
                rows += self._averages(parameter).values()
        for tensor in rows:
            # A few columns at a time, because a process that has a part of the latents needs all of a column's.
            for columns in tensor.view(tensor.shape[0], -1).split(SORTED_COLUMNS, dim=1):
                whole = sae.gather_rows(columns.contiguous()) if isinstance(sae, ShardedSAE) else columns
                columns.copy_(whole[order[self.rows]])

    def read_log(self) -> dict[str, Any]:
        """Read what was added up since the last call.

        Returns:
            Means over the steps: `loss`, `aux_loss`, `l0`, with fixed prefixes `level_losses` (each level's error over
            the variance); with `kl_from`, from that step on, `kl`, the divergence in nats per token; and `dead`, the
            share of latents that are dead now.
        """
        dead = self.sae.ranks.total(int((self.silent_tokens > self.dead_after).sum())) / self.sae.config.num_latents
        values = self.log.means(levels=self.sae.config.prefix_sampling == "fixed")
        self.log.reset()
        return values | {"dead": dead}

    # State

    def latent_state(self) -> dict[str, Tensor]:
        """What the next step depends on besides the SAE's weights, and has a row for each latent that is here."""
        rows = {"threshold": self.sae.threshold.detach(), "silent_tokens": self.silent_tokens}
        if self.args.sort_latents_at is not None:
            rows["energies"] = self.energies
        for name, parameter in self.sae.named_parameters():
            if name in PER_LATENT:
                rows |= {f"{name}.{key}": value for key, value in self._averages(parameter).items()}
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The rest of what the next step depends on; the same in every process."""
        if self.optimizer is None:
            raise RuntimeError("Learner.state_dict was called before Learner.start.")
        shared = {name: value for name, value in self.sae.named_parameters() if name not in PER_LATENT}
        return {
            "optimizer": {
                "step": self.optimizer.state[self.sae.b_dec]["step"],
                **{name: self._averages(parameter) for name, parameter in shared.items()},
                "peak_lr": [group["peak_lr"] for group in self.optimizer.param_groups],
            },
            "moments": self.moments,
            "sparsity_weight": self.sparsity_weight,
            "log": self.log.state_dict(divergence=self.args.kl_from is not None),
            **({"penalties": self.penalties} if self.sae.config.p_end < 1 else {}),
        }

    def _averages(self, parameter: Tensor) -> dict[str, Tensor]:
        if self.optimizer is None:
            raise RuntimeError("Learner.latent_state was called before Learner.start.")
        return {key: self.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}

    def load_state_dict(self, state: dict[str, Any], rows: dict[str, Tensor]) -> None:
        """Go on from a saved state; the SAE has its weights already.

        Args:
            state: As `state_dict` gave it.
            rows: This process's rows of `latent_state`.
        """
        device = self.device
        if self.graphs is not None:
            self.graphs.clear()
        self.sae.threshold.data.copy_(rows["threshold"])
        self.silent_tokens = rows["silent_tokens"].to(device)
        if "energies" in rows:
            self.energies = rows["energies"].to(device)
        self.moments = {name: value.to(device) for name, value in state["moments"].items()}
        self.sparsity_weight = state["sparsity_weight"].to(device)
        if self.sae.config.p_end < 1:
            self.penalties = state["penalties"].to(device)
        self.optimizer = self._make_optimizer()
        saved = state["optimizer"]
        for group, peak_lr in zip(self.optimizer.param_groups, saved["peak_lr"], strict=True):
            group["peak_lr"] = peak_lr
        for name, parameter in self.sae.named_parameters():
            keys = ("exp_avg", "exp_avg_sq")
            values = {key: rows[f"{name}.{key}"] for key in keys} if name in PER_LATENT else saved[name]
            step = saved["step"].to(device, copy=True)
            self.optimizer.state[parameter] = {"step": step} | {key: v.to(device) for key, v in values.items()}
        self.log.load_state_dict(state["log"])


def _default_dead_after(tokens_per_step: int, max_steps: int) -> int:
    """10M tokens, as in sparsify and dictionary_learning, but no more than a twentieth of a short run."""
    return max(tokens_per_step, min(10_000_000, max_steps * tokens_per_step // 20))


def make_learners(
    run: Run,
    saes: Mapping[str, MatryoshkaSAE],
    sites: Mapping[str, Site],
    length: Length,
    output_sites: Mapping[str, Site] | None = None,
    end_to_end: EndToEnd | None = None,
) -> list[Learner]:
    """Make a learner for each SAE: of all its latents, or, with `shard_latents`, of this process's part of them.

    Args:
        run: The run.
        saes: SAEs by name.
        sites: Sites by the SAEs' names.
        length: Steps of the run.
        output_sites: Where what they reconstruct comes from, by the same names; by default `sites`.
        end_to_end: What has the language model's predictions count, where they do.

    Returns:
        The learners, in the order of the SAEs.
    """
    learners = []
    for name, sae in saes.items():
        trained = sae
        if run.args.shard_latents:
            trained = ShardedSAE(sae.config, run.processes, run.device)
            if run.args.init_from is not None:
                trained.take_rows(sae)
        output_site = (output_sites or sites)[name]
        lengths = (length.first, length.extensions)
        learners.append(Learner(name, trained, sites[name], run, *lengths, output_site, end_to_end))
    return learners
