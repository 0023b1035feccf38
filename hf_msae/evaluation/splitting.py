"""Feature splitting: how many latents a probe of a concept needs before one more adds less than 0.03 to its F1.

These are the concept's main latents (Chanin et al., arXiv:2409.14507), of which absorption asks whether they fire.
"""

import torch
from torch import Tensor

from hf_msae.evaluation.labelled import Encoder, LabelledActivations
from hf_msae.evaluation.probes import Samples, fit_probes, score_logits

CANDIDATES, MAX_SPLIT = 20, 10
MIN_GAIN = 0.03


def main_latents(
    data: LabelledActivations, encode: Encoder, at_once: int, train: Samples, test: Samples, differences: Tensor
) -> tuple[list[list[int]], Tensor]:
    """Each concept's main latents, the best first, and the F1 of a probe on them on test examples.

    Of the 20 latents that rise most with the concept, the first is the one whose firing alone tells it best (F1), the
    others follow by their coefficients in a probe on all 20, in standard deviations; then as many are taken as add
    more than 0.03 to the F1 on training examples. (The papers order by an L1 probe on all latents.)

    Args:
        data: labelled examples.
        encode: gives an SAE's latents.
        at_once: tokens to encode together.
        train: samples of the concepts to choose and fit on.
        test: samples of the same concepts to score on.
        differences: mean with the concept − mean without, (num_concepts, m).

    Returns:
        For each concept the numbers of its latents; and the F1, (num_concepts,).
    """
    candidates = differences.topk(min(CANDIDATES, differences.shape[1]), dim=1).indices
    columns = candidates.flatten().unique()
    features = data.features(encode, at_once, columns)
    places = torch.searchsorted(columns, candidates)
    together = fit_probes(features, train, places)
    seen = train.rows[train.weights > 0].unique()
    strength = together.direction * features[seen].double().std(0)[places]
    strength.scatter_(1, _best_alone(features, train, places)[:, None], torch.inf)
    ordered = torch.gather(places, 1, strength.argsort(dim=1, descending=True))
    counts = torch.ones(len(differences), dtype=torch.int64)
    growing = torch.ones(len(differences), dtype=torch.bool)
    train_f1 = test_f1 = torch.zeros(len(differences), dtype=torch.float64)
    for k in range(1, min(MAX_SPLIT, ordered.shape[1]) + 1):
        probes = fit_probes(features, train, ordered[:, :k])
        f1 = score_logits(probes.logits(features, train), train).f1
        growing &= f1 > train_f1 + MIN_GAIN if k > 1 else True
        if not growing.any():
            break
        counts[growing] = k
        of_test = score_logits(probes.logits(features, test), test).f1
        train_f1, test_f1 = torch.where(growing, f1, train_f1), torch.where(growing, of_test, test_f1)
    numbers = columns[ordered]
    return [numbers[concept, :count].tolist() for concept, count in enumerate(counts.tolist())], test_f1


def _best_alone(features: Tensor, train: Samples, places: Tensor) -> Tensor:
    """Which of its candidates fires on a concept's training examples with the highest F1, (num_concepts,)."""
    fires = features[train.rows[:, :, None], places[:, None, :]] > 0
    logits = fires.double().permute(2, 0, 1) - 0.5
    return torch.stack([score_logits(candidate, train).f1 for candidate in logits], 1).argmax(1)
