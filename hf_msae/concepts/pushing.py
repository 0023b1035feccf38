"""What a shift of the activations does to the next-token distribution of neutral text, by running the model with it.

The shift is added to every token that `steer` would steer: not to special tokens, not to outliers. With p the model as
it is and q the shifted one, both means over the tokens of the text:

- *said*: Σ_{v in wanted} q(v), the probability of the tokens that are to be said;
- *loss*: −Σ_v q(v) log p(v) less what it is for q = p: by how much what the shifted model writes next is less likely
  to the model as it is, in nats per token, which is how steered texts are judged, too;
- *kl*: KL(q ‖ p), in nats per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.data import Window
from hf_msae.data.forward import groups
from hf_msae.data.windows import TokenBatch, collate
from hf_msae.devices import device_of
from hf_msae.outliers import within_limit
from hf_msae.sites import Site, in_this_thread, replace, site_width
from hf_msae.sites.replaying import Outputs, layers_before, recorded, replayed

# A shift is found whose loss is that which is asked for, to within this share.
LOSS_TOLERANCE = 0.08
MAX_TRIES = 10
# By how much the length of a shift may change from one try to the next.
LARGEST_STEP = 5.0


@dataclass(frozen=True)
class Effect:
    """What a shift does.

    Args:
        said: probability of the wanted tokens.
        loss: rise of the loss of what is said, in nats per token.
        kl: divergence from the model as it is, in nats per token.
    """

    said: float
    loss: float
    kl: float


class NeutralText:
    """Some text, on which shifts are tried out.

    What layers before the site make of it is kept, (windows, tokens, hidden_size) for each of them, and not computed
    again with every shift, in all models of which that is the same to the bit.

    Args:
        model: in evaluation mode.
        site: where in it.
        windows: of the text.
        wanted: the tokens that are to be said, (n,) int64.
        norm_limit: beyond which activations are outliers; None or 0 for no limit.
        pad_id: the token that fills short windows.
        lm_batch_size: windows per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: Site,
        windows: Sequence[Window],
        wanted: Tensor,
        *,
        norm_limit: float | None,
        pad_id: int,
        lm_batch_size: int,
    ) -> None:
        self.model, self.site, self.norm_limit = model, site, norm_limit
        device = device_of(model)
        self.batches = [collate(group, pad_id) for group in groups(windows, lm_batch_size)]
        self.num_tokens = sum(int(batch["keep"].sum()) for batch in self.batches)
        self.wanted = wanted.to(device)
        self.earlier: list[Outputs] = []
        self.before: list[Tensor] = []
        with torch.no_grad():
            for batch in self.batches:
                with recorded(layers_before(model, site)) as outputs:
                    self.before.append(self._log_probs(batch, None, {}))
                self.earlier.append(outputs)
            if not self._can_replay():
                self.earlier = [{} for _ in self.batches]
            self.entropy = sum(-float((p.exp() * p).sum()) for p in self.before) / self.num_tokens
            self.at_rest = Effect(self._said(self.before), 0.0, 0.0)

    @torch.no_grad()
    def effect(self, shift: Tensor) -> Effect:
        """What a shift does.

        Args:
            shift: (hidden_size,).
        """
        said = loss = kl = 0.0
        for batch, before, earlier in zip(self.batches, self.before, self.earlier, strict=True):
            after = self._log_probs(batch, shift, earlier)
            q = after.exp()
            said += float(q[:, self.wanted].sum())
            loss -= float((q * before).sum())
            kl += float((q * (after - before)).sum())
        return Effect(said / self.num_tokens, loss / self.num_tokens - self.entropy, kl / self.num_tokens)

    def gradients(self, shift: Tensor) -> tuple[Effect, Tensor, Tensor]:
        """What a shift does, and the derivatives of log *said* and of *loss* with respect to it.

        Args:
            shift: (hidden_size,).

        Returns:
            The effect (without `kl`, which is 0 there), and two vectors (hidden_size,).
        """
        said = loss = 0.0
        of_said, of_loss = torch.zeros_like(shift), torch.zeros_like(shift)
        for batch, before, earlier in zip(self.batches, self.before, self.earlier, strict=True):
            variable = shift.detach().clone().requires_grad_()
            with torch.enable_grad():
                q = self._log_probs(batch, variable, earlier).exp()
                sums = (q[:, self.wanted].sum(), -(q * before).sum())
            (first,) = torch.autograd.grad(sums[0], variable, retain_graph=True)
            (second,) = torch.autograd.grad(sums[1], variable)
            said, loss = said + float(sums[0].detach()), loss + float(sums[1].detach())
            of_said, of_loss = of_said + first, of_loss + second
        effect = Effect(said / self.num_tokens, loss / self.num_tokens - self.entropy, 0.0)
        return effect, of_said / max(said, 1e-30), of_loss / self.num_tokens

    def at_loss(self, direction: Tensor, loss: float, length: float | None = None) -> tuple[float, Effect]:
        """How long a shift in a direction has which loss, and what it does then.

        The loss of a short shift grows with the square of its length. So the first tries go by its root; once one is
        too short and one too long, the next lies between them.

        Args:
            direction: (hidden_size,), of any length.
            loss: that is asked for.
            length: of the first try; by default that of an activation's tenth.

        Returns:
            The length and the effect. Where no length has that loss, those of the last try.
        """
        unit = direction / direction.norm().clamp_min(1e-30)
        length = self.usual_length / 10 if length is None else length
        tried: list[tuple[float, Effect]] = []
        for _ in range(MAX_TRIES):
            tried.append((length, self.effect(unit * length)))
            if abs(tried[-1][1].loss / loss - 1) <= LOSS_TOLERANCE:
                break
            length = _next_length(tried, loss)
        return min(tried, key=lambda one: abs(one[1].loss - loss))

    @property
    def usual_length(self) -> float:
        """The mean norm of the activations to which shifts are added."""
        return self._lengths / max(1, self.num_tokens)

    def _said(self, log_probs: Sequence[Tensor]) -> float:
        return sum(float(part[:, self.wanted].exp().sum()) for part in log_probs) / self.num_tokens

    def _can_replay(self) -> bool:
        """Whether the model gives the same to the bit where what earlier layers gave is put in their place."""
        nothing = torch.zeros(site_width(self.model, self.site), device=device_of(self.model))
        try:
            return torch.equal(self._log_probs(self.batches[0], nothing, self.earlier[0]), self.before[0])
        except Exception:  # whatever a later layer does that misses more of an earlier one than its output
            return False

    _lengths = 0.0

    def _log_probs(self, batch: TokenBatch, shift: Tensor | None, earlier: Outputs) -> Tensor:
        """Log-probabilities (tokens that count, vocabulary) of what follows each token that counts."""
        device = device_of(self.model)
        inputs = {"input_ids": batch["input_ids"].to(device)}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = batch["attention_mask"].to(device)
        keep = batch["keep"].to(device)
        with replace(self.model, {self.site: self._edit(keep, shift)}, in_this_thread()), replayed(earlier):
            logits = self.model(**inputs, use_cache=False).logits
        return logits[keep.to(logits.device)].float().log_softmax(-1)

    def _edit(self, keep: Tensor, shift: Tensor | None) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            acts = keep.to(hidden.device) & within_limit(hidden, self.norm_limit)
            if shift is None:
                self._lengths += float(hidden[acts].float().norm(dim=-1).sum())
                return hidden
            return torch.where(acts.unsqueeze(-1), hidden + shift.to(hidden), hidden)

        return edit


def _next_length(tried: Sequence[tuple[float, Effect]], loss: float) -> float:
    """The length to try after those that were tried."""
    roots = [(length, max(0.0, effect.loss) ** 0.5) for length, effect in tried]
    short = max((one for one in roots if one[1] < loss**0.5), default=None)
    long = min((one for one in roots if one[1] >= loss**0.5 and (short is None or one[0] > short[0])), default=None)
    if short is not None and long is not None:
        share = (loss**0.5 - short[1]) / (long[1] - short[1])
        # Not too near either end: where the loss is steep, steps along its chord are small.
        return short[0] + min(0.8, max(0.2, share)) * (long[0] - short[0])
    length, root = roots[-1]
    return length * min(LARGEST_STEP, max(1 / LARGEST_STEP, loss**0.5 / max(root, 1e-9)))
