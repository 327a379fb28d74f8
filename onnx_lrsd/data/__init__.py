"""Samples: where they come from and how a model takes them."""
