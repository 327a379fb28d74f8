"""An ONNX file and its parts: load, edit, save."""
