"""CUDA C++ kernels, compiled when they are first needed by NVRTC, the compiler that comes with torch's CUDA builds."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS = {int: ctypes.c_int, float: ctypes.c_float}
SWIZZLES = {32: "SWIZZLE_32B", 64: "SWIZZLE_64B", 128: "SWIZZLE_128B"}


def why_not(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why kernels for this compute capability cannot be compiled or run here, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "needs a CUDA device"
    if (found := torch.cuda.get_device_capability(device)) != capability:
        return f"needs sm_{capability[0]}{capability[1]}, this is sm_{found[0]}{found[1]}"
    return None if importlib.util.find_spec("cuda.bindings") else "needs the package cuda-bindings"


def assembled(constants: dict[str, Any], *parts: str) -> str:
    """A source for Hopper: the constants as macros, in capitals; what its kernels share (hopper.cuh); its own parts."""
    defines = "".join(f"#define {name.upper()} {int(value)}\n" for name, value in constants.items())
    return "\n".join([defines, Path(__file__).with_name("hopper.cuh").read_text(encoding="utf-8"), *parts])


def compiled(source: str, arch: str = "sm_90a") -> bytes:
    """The machine code (cubin) of a source; RuntimeError with the compiler's words if there is none."""
    from cuda.bindings import nvrtc  # pyright: ignore

    program = _ok(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error.value:
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.rstrip(b"\0 \n").decode())
    code = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program))
    _ok(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _kept(source: str) -> bytes:
    """`compiled`, from the folder of kernels if it is there."""
    from cuda.bindings import nvrtc  # pyright: ignore

    version = _ok(nvrtc.nvrtcVersion(), whole=True)
    folder = Path(os.environ.get("SID_CACHE") or "~/.cache/sid").expanduser() / "kernels"
    path = folder / (hashlib.sha256(f"{version}\n{source}".encode()).hexdigest() + ".cubin")
    if path.is_file():
        return path.read_bytes()
    code = compiled(source)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)  # another process may do the same
    return code


@functools.cache
def function(source: str, name: str, shared: int, device: int) -> Any:
    """A kernel, loaded on a device, that may have this many bytes of dynamic shared memory."""
    from cuda.bindings import driver  # pyright: ignore

    torch.cuda.init()
    with torch.cuda.device(device):
        module = _ok(driver.cuModuleLoadData(_kept(source)))
        kernel = _ok(driver.cuModuleGetFunction(module, name.encode()))
        largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _ok(driver.cuFuncSetAttribute(kernel, largest, shared))
    return kernel


@functools.lru_cache(maxsize=4096)
def _map(pointer: int, width: int, height: int, stride: int, box: tuple[int, int], swizzle: int) -> Any:
    from cuda.bindings import driver as d  # pyright: ignore

    kind = d.CUtensorMapSwizzle
    return _ok(
        d.cuTensorMapEncodeTiled(
            d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, pointer,
            [d.cuuint64_t(width), d.cuuint64_t(height)], [d.cuuint64_t(stride)],
            [d.cuuint32_t(box[0]), d.cuuint32_t(box[1])], [d.cuuint32_t(1), d.cuuint32_t(1)],
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            kind.CU_TENSOR_MAP_SWIZZLE_NONE if swizzle == 0 else getattr(kind, "CU_TENSOR_MAP_" + SWIZZLES[swizzle]),
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


def tensor_map(x: Tensor, box: tuple[int, int], swizzle: int) -> Any:
    """What the copy engine wants to know of a matrix, rows contiguous and in multiples of 16 bytes: its bytes.

    box: bytes of a row and rows that are copied at a time; swizzle: of so many bytes, 0 for none.
    """
    size = x.element_size()
    return _map(x.data_ptr(), x.shape[1] * size, x.shape[0], x.stride(0) * size, box, swizzle)


def launch(kernel: Any, blocks: int, threads: int, shared: int, args: list[Any]) -> None:
    """Run a kernel in the current stream. args: tensors (their address, None for null), maps, numbers of 32 bits."""
    from cuda.bindings import driver  # pyright: ignore

    values, kinds = [], []
    for x in args:
        if x is None or isinstance(x, Tensor):
            values.append(0 if x is None else x.data_ptr())
            kinds.append(ctypes.c_void_p)
        else:
            values.append(x)
            kinds.append(NUMBERS.get(type(x)))
    stream = torch.cuda.current_stream().cuda_stream
    _ok(driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared, stream, (tuple(values), tuple(kinds)), 0))


def _ok(result: tuple, whole: bool = False) -> Any:
    error, *values = result
    if error.value:
        raise RuntimeError(f"CUDA: {error.name}")
    return values if whole else values[0] if values else None
