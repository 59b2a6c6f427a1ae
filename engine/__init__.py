"""The bundle on disk: specifications, manifest, and ONNX to TensorRT plans."""
