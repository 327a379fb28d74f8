"""``python -m onnx_lrsd`` is the command ``onnx-lrsd``."""

from onnx_lrsd.cli import main

if __name__ == "__main__":
    main(prog_name="onnx-lrsd")
