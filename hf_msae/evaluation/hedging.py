"""What is now `hf_msae.research.hedging`."""

from hf_msae.moved import moved

__getattr__ = moved(__name__, "hf_msae.research.hedging")
