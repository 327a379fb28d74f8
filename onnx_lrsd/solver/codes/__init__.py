"""Weights in codes of few bits: rounding, fits and curves."""
