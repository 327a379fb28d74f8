"""Int8 after the rewrite."""
