"""The mathematics of one layer: arrays in, factors out; no graph, no runtime."""
