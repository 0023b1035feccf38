"""One SAE being trained: its optimizer, its counters, its step.

A run has as many learners as SAEs and feeds them all from one pass of the language model. A learner touches no data
source and no file. What it accumulates between two log lines stays on the device, so that the training loop never
waits for it.

Losses are divided by the variance of the activations, and the biases, which alone live in activation units, get a
learning rate in those units (Adam makes a step of fixed size, so this equals training on activations scaled to unit
variance and folding the scale into the biases afterwards). That is why one set of defaults serves every model and
site.
"""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.sparse_ops import GradientMemory
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.optimizer import DictionaryAdam
from hf_msae.training.schedules import annealed_k, default_learning_rate, learning_rate_factor, sample_prefix_sizes

# How fast the L0 controller of `relu` moves the sparsity weight: a relative change of 2% a step at twice the target.
CONTROLLER_RATE = 0.03
# Encoder rows start as this times the decoder rows. k unit rows together would reconstruct an activation several times
# over; starting low costs nothing and gave 0.015 more FVE at the last level after 730 steps (docs/training.md).
INITIAL_ENCODER_SCALE = 0.3


class Learner:
    """Trains one SAE on batches of activations.

    Args:
        name: what logs and folders call it.
        sae: the model, on the device where it is trained; its weights are overwritten by `start`.
        site: where its activations come from.
        args: the run's arguments.
        max_steps: length of the run, for the schedules.
        accelerator: the process group.
    """

    def __init__(
        self,
        name: str,
        sae: MatryoshkaSAE,
        site: Site,
        args: SAETrainingArguments,
        max_steps: int,
        accelerator: Accelerator,
    ) -> None:
        self.name, self.sae, self.site, self.args, self.accelerator = name, sae.train(), site, args, accelerator
        self.max_steps = max_steps
        if accelerator.device.type == "cpu":
            sae.gradient_memory = GradientMemory()
        config, device = sae.config, accelerator.device
        self.learning_rate = args.learning_rate or default_learning_rate(config.num_latents, max_steps)
        self.dead_after = args.dead_after_tokens or self._default_dead_after()
        double = {"dtype": torch.float64, "device": device}
        # Everything below is what a checkpoint must hold besides the weights.
        self.moments = {"count": torch.zeros((), **double), "square": torch.zeros((), **double)}
        self.moments["sum"] = torch.zeros(config.hidden_size, **double)
        self.silent_tokens = torch.zeros(config.num_latents, dtype=torch.int64, device=device)
        self.sparsity_weight = torch.full((), float(config.sparsity_weight), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.optimizer: DictionaryAdam | None = None
        self._reset_log()

    def _default_dead_after(self) -> int:
        """10M tokens, as in sparsify and dictionary_learning, but no more than a twentieth of a short run."""
        per_step = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return max(per_step, min(10_000_000, self.max_steps * per_step // 20))

    # Beginning

    @torch.no_grad()
    def start(self, activations: Tensor) -> None:
        """Initialise from the first activations (n, hidden_size): the decoder bias at their mean, the variance, the
        step sizes.
        """
        self._update_moments(activations.to(self.accelerator.device))
        self.sae.b_dec.copy_(self.moments["sum"] / self.moments["count"])
        self.sae.b_enc.zero_()
        # Drawn on the CPU, so that a seed means the same on every device and in every process.
        generator = torch.Generator().manual_seed(self.args.seed)
        rows = torch.randn(self.sae.W_dec.shape, generator=generator)
        self.sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=-1))
        self.sae.W_enc.copy_(INITIAL_ENCODER_SCALE * self.sae.W_dec)
        if self.sae.config.activation == "jumprelu":
            # Without this the first steps are dense: a threshold learns only from pre-activations near it.
            self.sae.threshold.fill_(1.0)
            self.sae.calibrate_threshold([activations.to(self.accelerator.device)])
        self.optimizer = self._make_optimizer()
        for moment in self.moments.values():
            moment.zero_()  # the first step counts these activations again

    def _make_optimizer(self) -> DictionaryAdam:
        scale = math.sqrt(self.variance.item() / self.sae.config.hidden_size)
        in_activation_units = [self.sae.b_enc, self.sae.b_dec]
        if self.sae.config.activation == "jumprelu":
            in_activation_units.append(self.sae.threshold)
        groups = [
            {"params": [self.sae.W_enc, self.sae.W_dec], "peak_lr": self.learning_rate},
            {"params": in_activation_units, "peak_lr": self.learning_rate * scale},
        ]
        args = self.args
        return DictionaryAdam(
            groups,
            self.sae.W_dec,
            args.max_grad_norm,
            lr=self.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )

    @property
    def variance(self) -> Tensor:
        """Running total variance of the activations, E‖x - E x‖², scalar float64."""
        mean = self.moments["sum"] / self.moments["count"]
        variance = self.moments["square"] / self.moments["count"] - mean.pow(2).sum()
        return variance.clamp_min(1e-12)

    def _update_moments(self, x: Tensor) -> None:
        doubles = x.double()
        parts = torch.cat([doubles.sum(0), doubles.pow(2).sum()[None], doubles.new_tensor([x.shape[0]])])
        parts = self.accelerator.reduce(parts, "sum")
        self.moments["sum"] += parts[:-2]
        self.moments["square"] += parts[-2]
        self.moments["count"] += parts[-1]

    # One step

    def finish(self) -> None:
        """Give back what only training needs."""
        self.sae.gradient_memory = None
        self.sae.eval()

    def step(self, activations: Tensor, step: int) -> None:
        """Take one optimizer step on activations (batch, hidden_size); `step` counts from 0."""
        config, device = self.sae.config, self.accelerator.device
        if self.optimizer is None:
            raise RuntimeError("Learner.step was called before Learner.start.")
        x = activations.to(device, torch.float32)
        self._update_moments(x)
        prefix_sizes = (
            sample_prefix_sizes(step, config, self.args.seed) if config.prefix_sampling == "pareto" else None
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            output = self.sae(
                x,
                dead_latents=self.silent_tokens > self.dead_after,
                prefix_sizes=prefix_sizes,
                variance=self.variance.float(),
                k=annealed_k(step, self.max_steps, config, self.args),
                sparsity_weight=self.sparsity_weight,
                return_latents=False,
            )
        output.loss.backward()
        factor = learning_rate_factor(step, self.max_steps, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._reduce_gradients()
        self.optimizer.step()
        self._drop_gradients()
        self._after_step(output, x.shape[0], step)

    def _drop_gradients(self) -> None:
        if self.sae.gradient_memory is not None:
            self.sae.gradient_memory.keep(self.sae.parameters())
        elif self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.sae.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    @torch.no_grad()
    def _after_step(self, output: Any, num_tokens: int, step: int) -> None:
        if self.sae.config.activation == "jumprelu":
            self.sae.threshold.clamp_(min=0)
        if output.active is not None:
            counts = torch.bincount(output.active.latents, minlength=self.sae.config.num_latents)
        else:
            counts = (output.latents > 0).sum(0)
        counts = self.accelerator.reduce(counts, "sum")
        self.silent_tokens += num_tokens * self.accelerator.num_processes
        self.silent_tokens[counts > 0] = 0
        l0 = counts.sum() / (num_tokens * self.accelerator.num_processes)
        if self.sae.config.activation == "relu":
            self.sparsity_weight *= (l0 / self.sae.config.k).clamp(0.5, 2) ** CONTROLLER_RATE
        finite = output.loss.isfinite()
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, step, self.bad_step)
        self._log_sums += torch.stack([output.loss.detach().double(), output.aux_loss.double(), l0.double()])
        self._log_levels += output.level_losses.double() if output.level_losses.shape == self._log_levels.shape else 0
        self._log_steps += 1

    # Logging

    def _reset_log(self) -> None:
        double = {"dtype": torch.float64, "device": self.accelerator.device}
        self._log_sums = torch.zeros(3, **double)
        self._log_levels = torch.zeros(self.sae.config.num_levels, **double)
        self._log_steps = 0

    def read_log(self) -> dict[str, Any]:
        """Means since the last call: loss, auxiliary loss, L0, error of each level over the variance, dead latents
        now.
        """
        loss, aux_loss, l0 = (self._log_sums / max(1, self._log_steps)).tolist()
        levels = (self._log_levels / max(1, self._log_steps)).tolist()
        dead = (self.silent_tokens > self.dead_after).double().mean().item()
        values = {"loss": loss, "aux_loss": aux_loss, "l0": l0, "dead": dead}
        if self.sae.config.prefix_sampling == "fixed":
            values["level_losses"] = levels
        self._reset_log()
        return values

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the SAE's weights that the next step depends on."""
        if self.optimizer is None:
            raise RuntimeError("Learner.state_dict was called before Learner.start.")
        return {
            "optimizer": self.optimizer.state_dict(),
            "moments": self.moments,
            "silent_tokens": self.silent_tokens,
            "sparsity_weight": self.sparsity_weight,
            "log": {"sums": self._log_sums, "levels": self._log_levels, "steps": self._log_steps},
        }

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: `weights` are the SAE's own state, `state` the rest."""
        device = self.accelerator.device
        self.sae.load_state_dict(weights)
        self.moments = {name: value.to(device) for name, value in state["moments"].items()}
        self.silent_tokens = state["silent_tokens"].to(device)
        self.sparsity_weight = state["sparsity_weight"].to(device)
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self._log_sums = state["log"]["sums"].to(device)
        self._log_levels = state["log"]["levels"].to(device)
        self._log_steps = state["log"]["steps"]
