"""Measuring: GPU time in CUDA graphs, host time of calls, always next to eager PyTorch and ``torch.compile``."""
