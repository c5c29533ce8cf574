"""Operations written for the GPU in Triton, each in a file of its own, as differentiable functions of tensors.

    tiled_attention.py       FlashAttention-2 in plain PyTorch, to be read first
    reference_attention.py   what attention is, mask by mask: the judge
    triton_attention.py      attention without the T x S scores, for every NVIDIA GPU since 8.0
    hopper_attention.py      the same for Hopper GPUs alone, faster
    short_attention.py       rotation and attention in one kernel for them, of sequences of up to 256 positions
    flash_attention.py       the function to call: takes the best of them that can run
    rotary_attention.py      the same after QK-norm and rotation, with one gradient for queries, keys and values
    product.py               matrix products with SwiGLU or that rotation behind them, in one kernel on Hopper GPUs

Import from the file, `from lfs_cli.kernels.flash_attention import flash_attention`: a function re-exported here would
hide the module of the same name. Every file imports on a machine without Triton or a GPU.
"""
