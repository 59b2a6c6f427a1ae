"""Bundles as models of NVIDIA's Triton Inference Server: what ``svd-trt triton`` writes, and what Triton then runs."""
