"""Statistics of a tensor on a CUDA device in one read; the plain code in torch is the oracle.

``statistics.cu`` is compiled by NVRTC, which comes with torch's CUDA builds, at the first use.
Where that fails, :func:`usable` says no, :func:`why_not` says why, and the plain code runs.
"""

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zo_core.analysis.statistics import Statistics

SOURCE = Path(__file__).with_name("statistics.cu")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOAD = 16
"""Bytes a load."""
THREADS_X, THREADS_Y, TOP = 32, 16, 3
SHARED = 4 << 15
"""Bytes of the histogram of a block: 2**15 bins."""
LARGEST = 1 << 31
"""Entries a launch: places are 32-bit numbers."""


def usable(states: torch.Tensor) -> bool:
    """Whether the kernel can take a tensor."""
    return states.is_cuda and states.dtype in ELEMENTS and not why_not(states.device.index or 0)


@cache
def why_not(device: int) -> str:
    """Why a CUDA device has no kernel; empty if it has."""
    if torch.version.cuda is None:
        return "no CUDA build of torch"
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    if room < SHARED:
        return f"{SHARED >> 10} KiB of shared memory a block are needed and {room >> 10} are there"
    try:
        _compiled(device, torch.bfloat16, 1)
    except (OSError, RuntimeError, AttributeError) as error:  # no NVRTC, or none that compiles it
        return str(error)
    return ""


@cache
def _compiled(device: int, dtype: torch.dtype, vector: int) -> Any:
    from torch.cuda import _utils as gpu

    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        options = [
            f"--gpu-architecture=sm_{major}{minor}",
            "--std=c++17",
            f"-DELEMENT={ELEMENTS[dtype]}",
            f"-DVECTOR={vector}",
        ]
        binary = _nvrtc(SOURCE.read_text(), options)
        kernel = gpu._cuda_load_module(binary, ["statistics"])["statistics"]  # type: ignore[index]
        kernel.set_shared_memory_config(SHARED)
    return kernel


def _nvrtc(source: str, options: list[str]) -> bytes:
    """Compile to a CUDA binary.

    torch's own wrapper asks for an installed CUDA toolkit, which nothing here needs.

    Raises:
        RuntimeError: the source does not compile; with the compiler's log.
        OSError: there is no NVRTC.
    """
    from torch.cuda import _utils as gpu

    with suppress(OSError):  # its run path leads to the NVRTC that torch brought
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
    nvrtc = gpu._get_gpu_rtc_library()
    program = ctypes.c_void_p()

    def check(result: int) -> None:
        if result:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(max(size.value, 1))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC error {result}: {log.value.decode()}")

    words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    text = source.encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"statistics.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcCompileProgram(program, len(options), words))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


def add(statistics: "Statistics", states: torch.Tensor, start: int) -> None:
    """Take a piece in, as :meth:`Statistics.add` does; one launch, nothing waits for the device.

    The largest entries go to ``statistics.candidates`` as keys, see :func:`read`.

    Args:
        statistics: on the device of ``states``.
        states: contiguous [N, C] of consecutive tokens.
        start: the first of them.
    """
    rows = max(1, LARGEST // states.shape[1])
    for first in range(0, len(states), rows):
        _add(statistics, states[first : first + rows], start + first)


def _add(statistics: "Statistics", states: torch.Tensor, start: int) -> None:
    device, (rows, width) = states.device, states.shape
    vector = LOAD // states.element_size()
    if width % vector or states.data_ptr() % LOAD:
        vector = 1
    index = device.index or 0
    across = -(-width // (THREADS_X * vector))
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    down = max(1, min(processors // across, -(-rows // THREADS_Y)))
    keys = torch.empty(across * down * TOP, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        _compiled(index, states.dtype, vector)(
            grid=(across, down, 1),
            block=(THREADS_X, THREADS_Y, 1),
            args=[
                states,
                rows,
                width,
                start,
                statistics.histogram,
                statistics.sums,
                keys,
                statistics.first_nonfinite,
                statistics.channel_max,  # empty, and so null, unless it is kept
                statistics.channel_tokens,
            ],
            shared_mem=SHARED,
        )
    statistics.candidates.append((keys, start, width))


def read(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel's keys int64 [K] say: (magnitude, signed value, place in the piece).

    The magnitude is -1 where there was no entry.
    """
    there = keys > 0
    pattern = ((keys >> 32) - 1).to(torch.int32)
    magnitude = pattern.view(torch.float32).where(there, -1.0)
    place = 0x7FFFFFFF - ((keys >> 1) & 0x7FFFFFFF)
    return magnitude, magnitude.where(keys & 1 == 0, -magnitude), place.where(there, 0)
