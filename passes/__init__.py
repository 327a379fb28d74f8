"""Edits of a graph: find layers, split them, count what they cost. No arrays beyond folding constants."""
