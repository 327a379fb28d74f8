# onnx-lrsd for CPUs:
#   docker build -t onnx-lrsd .
#   docker run --rm -v "$PWD:/data" onnx-lrsd optimize model.onnx --calib calib.npz --ratio 2
FROM python:3.12-slim
COPY . /source
RUN pip install --no-cache-dir "/source[cpu]" && rm -r /source
WORKDIR /data
ENTRYPOINT ["onnx-lrsd"]
CMD ["--help"]
