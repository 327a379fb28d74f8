"""onnx-lrsd as a step of other tools: one module for each, which imports that tool."""
