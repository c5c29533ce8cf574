"""Operations written for the GPU in Triton, each in a file of its own, as differentiable functions of tensors.

    flash_attention.py   attention without the T x S scores, in Triton
    tiled_attention.py   the same algorithm in plain PyTorch, to be read first

Import from the file, `from lfs_cli.kernels.flash_attention import flash_attention`: a function re-exported here would
hide the module of the same name. Every file imports on a machine without Triton or a GPU.
"""
