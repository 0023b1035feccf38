"""What is now `hf_msae.research.toys`."""

from hf_msae.moved import moved

__getattr__ = moved(__name__, "hf_msae.research.toys")
