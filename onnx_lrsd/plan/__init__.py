"""From error curves to a form for every layer."""
