"""What a model costs and gives: measured, not predicted."""
