"""One module an operator: all that is particular to it."""
