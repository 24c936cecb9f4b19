"""A machine that runs compiled kernels without a GPU: PTX, thread by thread, on the memory of CPU tensors.

Triton's interpreter runs the source of a kernel. This runs what the compiler made of it, with the arguments that a
launch gives it, and says what compute-sanitizer would: accesses outside of tensors, misaligned ones, and races. What
ptxas makes of PTX, and the hardware's order of events, it does not show.
"""
