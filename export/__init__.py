"""The torch side: a diffusers checkpoint becomes four ONNX networks."""
