"""Worlds with known truth: places where what a dictionary ought to find is written down beforehand."""

# What the language model of the story world is called, wherever a model is named.
STORIES = "stories"
