"""Whether Triton's kernels can run here: compiled on CUDA, or interpreted on a CPU when TRITON_INTERPRET=1 is set."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_BATCH = 16         # rows of the smallest tile of a tensor core: a batch up to it is one tile


def interpreting() -> bool | None:
    """Whether Triton interprets its kernels, decided when they were defined; None where Triton is not installed.

    Under the interpreter the kernels cast their operands to fp32 first: its dot multiplies the raw bits of
    bfloat16 (triton-lang/triton issue 11584).
    """
    try:
        import triton
    except ImportError:              # no wheels outside Linux
        return None
    return triton.knobs.runtime.interpret


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton kernels are not the path for this tensor; None when they are."""
    if not x.is_cuda:
        return f"the tensor is on {x.device.type}"
    if interpreting() is None:
        return "Triton is not installed"
    if x.dtype not in DTYPES:
        return f"the kernels have no {x.dtype}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the kernels need compute capability 8.0"
    return None


def require_triton(x: Tensor, path: str) -> None:
    """ValueError, one line, when a forced Triton path cannot run on this tensor."""
    missing = None if x.device.type == "cpu" and interpreting() and x.dtype in DTYPES else why_not_triton(x)
    if missing is not None:
        raise ValueError(f"path={path!r} cannot run: {missing}; leave path out, or set TRITON_INTERPRET=1 "
                         f"before Python starts to interpret the kernel on a CPU")
