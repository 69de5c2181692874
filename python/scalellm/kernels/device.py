"""Which kernels compute a tensor: a GPU's are Triton's."""

from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels are to compute `x`; tests let them run on a CPU, interpreted."""
    return x.is_cuda
