"""A GPU that is not there, for torch that is built for CUDA 13.

    python tests/fake_gpu pytest tests/test_graphs.py --few 2
    python tests/fake_gpu bash bench/gpu.sh OUT --dry

run a command as it would run on a GPU: with torch's own streams, events, allocator, graphs and pinned memory, and
Triton's own driver, above a CUDA runtime and a driver in C that take the host's memory for the device's. torch's
operations are the CPU's on the same memory (``torch_kernels.py``), and our kernels run as PTX on the machine of
``tests/ptx/`` (``triton_kernels.py``), some seconds each: ``--few N`` takes N cases of every test. Nothing runs at the
same time as anything else, so that a missing wait is not found; nothing is timed, and a profiler sees no kernels.
"""
