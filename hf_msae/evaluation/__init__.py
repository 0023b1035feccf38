"""Measuring an SAE: one module a question."""
