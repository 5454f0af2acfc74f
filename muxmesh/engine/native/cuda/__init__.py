"""The forward pass for NVIDIA GPUs: products by torch, everything that touches the KV pool by Triton kernels."""
