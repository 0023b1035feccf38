"""Worlds with known truth: places where what a dictionary ought to find is written down beforehand."""
