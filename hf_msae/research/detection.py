"""How well latents detect features that are known, as SynthSAEBench measures it (arXiv:2602.14687).

Each latent is asked for the feature whose direction its decoder row is nearest to, whichever way it points, and how
well its firing tells that feature's firing. Directions alone give MCC, the mean absolute cosine of the best one-to-one
assignment of latents and features, and uniqueness, how many features are some latent's nearest, over the number of
latents. These are the definitions of `sae_lens.synthetic`, with which tests compare them; `hf_msae.research.recovery`
asks more, of smaller worlds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.errors import InputError
from hf_msae.metrics import ReconstructionMeter
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.recovery import assign
from hf_msae.research.toys import Samples

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Detection:
    """What a whole dictionary detects; means are over its latents.

    Args:
        f1: harmonic mean of precision and recall, 0 for a latent or feature that never fires.
        precision: of a latent's firings, the share on which its feature fires.
        recall: of its feature's firings, the share on which the latent fires.
        mcc: mean absolute cosine of the best one-to-one assignment.
        uniqueness: different nearest features, over the number of latents.
        dead: share of latents that never fired.
        shrinkage: mean length of the reconstruction over that of the activation.
        l0: active latents per sample.
        true_l0: features per sample.
        fve: fraction of variance explained.
    """

    f1: float
    precision: float
    recall: float
    mcc: float
    uniqueness: float
    dead: float
    shrinkage: float
    l0: float
    true_l0: float
    fve: float


@torch.no_grad()
def measure_detection(sae: MatryoshkaSAE, directions: Tensor, batches: Iterable[Samples]) -> Detection:
    """Measure an SAE on samples whose features are known.

    Args:
        sae: in evaluation mode.
        directions: of the features, (num_features, hidden_size).
        batches: samples, in parts.

    Raises:
        InputError: there are no samples.
    """
    cosines = normalize(sae.W_dec.float(), dim=1) @ normalize(directions.float(), dim=1).T
    cosines = cosines.abs_()
    nearest = cosines.argmax(1)
    meter, counts, true_l0 = ReconstructionMeter(sae), torch.zeros(3, sae.config.num_latents).double(), 0.0
    for samples in batches:
        meter.update(samples.x)
        true_l0 += (samples.features > 0).sum().item()
        for x, features in zip(samples.x.split(ROWS_AT_ONCE), samples.features.split(ROWS_AT_ONCE), strict=True):
            latent, feature = sae.encode(x) > 0, features[:, nearest] > 0
            counts += torch.stack([(latent & feature).sum(0), latent.sum(0), feature.sum(0)])
    if not meter.num_tokens:
        raise InputError("Nothing to measure: no samples were given.")
    both, of_latent, of_feature = counts
    precision, recall = both / of_latent.clamp_min(1), both / of_feature.clamp_min(1)
    matched = assign(cosines)
    rows = (matched >= 0).nonzero().flatten()
    level = meter.levels()[-1]
    return Detection(
        f1=(2 * both / (of_latent + of_feature).clamp_min(1)).mean().item(),
        precision=precision.mean().item(),
        recall=recall.mean().item(),
        mcc=cosines[rows, matched[rows]].mean().item(),
        uniqueness=nearest.unique().numel() / len(nearest),
        dead=level.dead,
        shrinkage=(meter.sums["norm_ratios"][-1] / meter.num_tokens).item(),
        l0=level.l0,
        true_l0=true_l0 / meter.num_tokens,
        fve=level.fve,
    )
