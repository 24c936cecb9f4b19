"""What every Python process above the libraries begins with, on Python's path for that: its kernels."""

import os
from pathlib import Path

import torch

# A test that brings a driver of its own asks only what arrives there.
if torch.cuda.is_available() and Path(os.environ["LD_PRELOAD"]).parent == Path(os.environ["TRITON_LIBCUDA_PATH"]):
    from fake_gpu import torch_kernels, triton_kernels

    torch_kernels.install()
    triton_kernels.install()
