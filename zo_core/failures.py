"""Turn any exception of a job into one sentence for the user. Imports no torch."""

import errno
import re
import sys
from dataclasses import dataclass

from pydantic import ValidationError

from zo_core.errors import MemoryExhaustedError, UserError
from zo_core.jobs import explain

_NEEDED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
_CPU_OOM = "DefaultCPUAllocator"
_CUDA_ERROR = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert", re.IGNORECASE)
FULL = (errno.ENOSPC, errno.EDQUOT)
LESS_MEMORY = "Try dtype bfloat16, a smaller batch_size or shorter texts, or unload other models."


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed job in words, and what it means for the worker."""

    sentence: str
    expected: bool = True
    """False: a defect of ours; the log gets the traceback."""
    out_of_memory: bool = False
    """Resident models should be released."""
    poisoned: bool = False
    """The CUDA context is lost: the worker process must restart."""


def disk_sentence(error: OSError) -> str | None:
    """A sentence for a full or read-only disk, None for any other error."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in FULL:
        return (
            f"The disk is full{where}: free some space, or set ZO_CACHE_DIR to another disk; "
            "everything written so far is kept."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Permission denied{where}: check the folder, or set ZO_CACHE_DIR to another."
    return None


def describe(error: BaseException) -> Failure:
    """The failure that an exception of a recipe stands for."""
    if isinstance(error, UserError):
        return Failure(str(error), out_of_memory=isinstance(error, MemoryExhaustedError))
    if isinstance(error, ValidationError):
        return Failure(explain(error))
    text = str(error)
    if isinstance(error, OSError) and (sentence := disk_sentence(error)):
        return Failure(sentence)
    # Libraries report a full disk as an error of their own, with the system's as text or cause.
    if is_full_disk(error):
        return Failure(disk_sentence(OSError(errno.ENOSPC, text)) or text)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        return Failure(_gpu_memory_sentence(text), out_of_memory=True)
    if isinstance(error, MemoryError) or _CPU_OOM in text:
        return Failure(f"Out of memory. {LESS_MEMORY}", out_of_memory=True)
    accelerator = getattr(torch, "AcceleratorError", ()) if torch is not None else ()
    if isinstance(error, accelerator) or (
        isinstance(error, RuntimeError) and _CUDA_ERROR.search(text)
    ):
        return Failure(
            f"The GPU reported an error ({_first_line(text)}); its worker restarts, "
            "other runs are not affected. See the log.",
            expected=False,
            poisoned=True,
        )
    return Failure(
        f"Unexpected {type(error).__name__}: {_first_line(text) or 'no message'} (see log)",
        expected=False,
    )


def _gpu_memory_sentence(text: str) -> str:
    needed, free = _NEEDED.search(text), _FREE.search(text)
    facts = []
    if needed:
        facts.append(f"{needed[1]} more needed")
    if free:
        facts.append(f"{free[2]} of {free[1]} free")
    return f"Out of GPU memory: {', '.join(facts) or _first_line(text)}. {LESS_MEMORY}"


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0].strip()
    return line if len(line) <= 300 else f"{line[:297]}..."


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, is about a full disk."""
    if "No space left on device" in str(error):
        return True
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in FULL:
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False
