"""ONNX Runtime: sessions, kernels and what comes out of them."""
