"""NVIDIA GPUs: the CUDA driver, streams and memory, and networks in TensorRT or ONNX Runtime on them."""
