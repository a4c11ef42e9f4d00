"""Sizes in, layers out. Knows no engine."""
