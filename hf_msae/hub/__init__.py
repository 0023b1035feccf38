"""The model card of an SAE."""

from hf_msae.hub.card import STORIES, render_model_card, write_model_card

__all__ = ["STORIES", "render_model_card", "write_model_card"]
