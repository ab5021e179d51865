"""Measuring: GPU time in CUDA graphs, host time of calls, next to eager PyTorch and ``torch.compile``."""
