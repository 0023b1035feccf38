"""A language model and an SAE in which everything is known: each word is a sum of the directions of its concepts, the
SAE reads them at the embeddings, and no two directions overlap.

w0 … w5 are animals, of which w0, w1, w2 are birds and the others fish; w20 … w25 are words of no kind. Latents: 0
animal, 1 every word, 2 and 3 nothing | 4 bird, 5 fish | 6 … 11 the words w0 … w5, 12 … 17 the words w20 … w25.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

WIDTH = 24
NUM_LATENTS = 18
ANIMAL, EVERY, BIRD, FISH, FIRST_WORD, FIRST_OTHER = 0, 1, 4, 5, 6, 12
STRENGTHS = {ANIMAL: 1.0, EVERY: 0.5, BIRD: 0.8, FISH: 0.8}
WORD_STRENGTH = 0.6


def latents_of_word(index: int) -> dict[int, float]:
    """The latents that fire on the word w<index>, with their activations."""
    active = {EVERY: STRENGTHS[EVERY]}
    if index < 6:
        kind = BIRD if index < 3 else FISH
        active |= {ANIMAL: STRENGTHS[ANIMAL], kind: STRENGTHS[kind], FIRST_WORD + index: WORD_STRENGTH}
    elif 20 <= index < 26:
        active[FIRST_OTHER + index - 20] = WORD_STRENGTH
    return active


@dataclass(frozen=True)
class KnownWorld:
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    sae: MatryoshkaSAE
    texts: list[str]


def build(tokenizer: PreTrainedTokenizerFast) -> KnownWorld:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    embeddings = torch.zeros(80, WIDTH)
    for index in range(60):
        for latent, strength in latents_of_word(index).items():
            embeddings[tokenizer.convert_tokens_to_ids(f"w{index}"), latent] = strength
    model.model.embed_tokens.weight.data.copy_(embeddings)
    torch.nn.init.normal_(model.lm_head.weight)
    sae_config = MatryoshkaSAEConfig(
        hidden_size=WIDTH,
        num_latents=NUM_LATENTS,
        prefix_sizes=[4, 6, 18],
        k=4,
        site="model.embed_tokens:output",
        context_length=16,
    )
    sae = MatryoshkaSAE(sae_config).eval()
    for weights in (sae.W_enc, sae.W_dec):
        weights.data.copy_(torch.eye(NUM_LATENTS, WIDTH))
    for dead in (2, 3):
        sae.W_enc.data[dead] = 0
    sae.threshold.fill_(0.1)
    generator = torch.Generator().manual_seed(3)
    words = torch.tensor([*range(6), *range(20, 26)])
    drawn = words[torch.randint(len(words), (150, 12), generator=generator)].tolist()
    return KnownWorld(model, tokenizer, sae, [" ".join(f"w{i}" for i in row) for row in drawn])
