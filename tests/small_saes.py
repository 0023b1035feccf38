"""SAEs whose numbers are known."""

import torch
from transformers import PreTrainedModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import capture, resolve_site


def copying_sae(scale: float = 1.0) -> MatryoshkaSAE:
    """Latents relu(x) and relu(-x), decoded to exactly `scale` times x."""
    config = MatryoshkaSAEConfig(
        hidden_size=16, num_latents=32, prefix_sizes=[16, 32], k=32, activation="relu", apply_b_dec_to_input=False
    )
    sae = MatryoshkaSAE(config).eval()
    signs = torch.cat([torch.eye(16), -torch.eye(16)])
    with torch.no_grad():
        sae.W_enc.copy_(signs)
        sae.W_dec.copy_(scale * signs)
    return sae


def rough_sae(seed: int, num_latents: int = 20, width: int = 6) -> MatryoshkaSAE:
    """Random, with decoder rows of all lengths."""
    config = MatryoshkaSAEConfig(hidden_size=width, num_latents=num_latents, prefix_sizes=[7, num_latents], k=5)
    sae = MatryoshkaSAE(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in (sae.W_enc, sae.W_dec):
            rows.copy_(torch.randn(rows.shape, generator=generator) * (0.3 + torch.rand(len(rows), 1)))
    sae.threshold.fill_(0.3)
    return sae


def mlp_transcoder(model: PreTrainedModel, skip: bool = False, **changes) -> MatryoshkaSAE:
    """A random transcoder of the MLP of the first layer, 6 of whose 32 latents are active on a token."""
    torch.manual_seed(0)
    sites = [resolve_site(model, name) for name in ("layers.0.mlp:input", "layers.0.mlp")]
    ids = torch.randint(3, 60, (16, 24))
    x, y = (hidden.flatten(0, 1) for hidden in capture(model, sites, input_ids=ids).values())
    places = {"site": str(sites[0]), "site_out": str(sites[1]), "hidden_size_out": y.shape[1], "skip": skip}
    shape = {"hidden_size": x.shape[1], "num_latents": 32, "prefix_sizes": [4, 12, 32], "k": 6}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | places | changes))).eval()
    with torch.no_grad():
        sae.W_dec *= 0.1 * y.norm(dim=-1).mean()
        sae.b_dec.copy_(y.mean(0))
        if skip:
            sae.W_skip.normal_(0, 0.05)
        sae.calibrate_threshold([x])
        sae.max_activation.copy_(sae.encode(x).amax(0).clamp_min(0.1))
    return sae
