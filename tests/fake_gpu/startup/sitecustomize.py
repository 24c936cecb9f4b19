"""What every Python process above the libraries begins with, on Python's path for that: its kernels."""

import torch

if torch.cuda.is_available():
    from fake_gpu import torch_kernels, triton_kernels

    torch_kernels.install()
    triton_kernels.install()
