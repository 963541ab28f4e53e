"""The engine process: a Dask scheduler and its worker processes, one a device, for one owner.

``backend`` starts it as ``python -m zo_core.engine`` with its standard input held open, reads one
JSON line (:class:`zo_core.engine_state.EngineAddress`) from its standard output, and closes
standard input to end it. It is a process of its own, not part of the app, because

* ``multiprocessing`` runs the parent's ``__main__`` again in every spawned worker, and inside
  Streamlit ``__main__`` is the page script;
* Dask's worker manager sets environment variables of the process it lives in;
* Ctrl-C in a terminal must reach the command line, which cancels its job, and not the worker.

Everything listens on loopback and speaks TLS with keys made at each start: plain loopback TCP
would let every user of the machine run code as this one.
"""

import asyncio
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
from distributed import Nanny, Scheduler, Security
from distributed.core import Status

from zo_core.engine_state import EngineAddress
from zo_core.runs import Process
from zo_core.settings import settings

DASK_CONFIG: dict[str, Any] = {
    # By default OMP_NUM_THREADS=1 and a 64 KiB trim threshold: both are right for a pool of small
    # tasks and wrong for one process that runs a model.
    "distributed.nanny.pre-spawn-environ": {},
    # The statistical profiler samples the job's thread a hundred times a second.
    "distributed.worker.profile.enabled": False,
    # A worker that is busy importing or compiling must not be given up.
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.active-memory-manager.start": False,
    # These HTTP servers cannot be turned off: leave them nothing to answer.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.diagnostics.nvml": False,
}
WATCH_EVERY = 1.0
MAX_BACKOFF = 60.0
_GPU_LINE = re.compile(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)")
_MIG_LINE = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def visible_gpus() -> list[str]:
    """Names of the GPUs to use, each good as a value of CUDA_VISIBLE_DEVICES.

    An existing CUDA_VISIBLE_DEVICES is obeyed. Torch is not imported: it would cost this process
    seconds and a CUDA context on every GPU.
    """
    if not _torch_has_cuda():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # As CUDA does: the first invalid entry hides the rest.
        stop = next((i for i, n in enumerate(names) if n in ("", "-1", "none", "void")), None)
        return names[:stop]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607 - wherever the driver put it
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        gpus = Path("/proc/driver/nvidia/gpus")
        return [str(i) for i, _ in enumerate(gpus.iterdir())] if gpus.is_dir() else []
    return parse_gpu_list(listing)


def parse_gpu_list(listing: str) -> list[str]:
    """UUIDs in the output of ``nvidia-smi -L``; a divided GPU counts as its MIG instances."""
    names: list[str] = []
    whole: str | None = None
    for line in [*listing.splitlines(), "GPU 0: (UUID: GPU-end)"]:
        if match := _GPU_LINE.match(line):
            if whole is not None:
                names.append(whole)
            whole = match[1]
        elif match := _MIG_LINE.match(line):
            names.append(match[1])
            whole = None
    return names


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(spec.submodule_search_locations[0]) / "version.py"
    with suppress(OSError):
        return re.search(r"^cuda\b[^=\n]*=\s*['\"]", version.read_text(), re.MULTILINE) is not None
    return False


def worker_specs(gpus: list[str], per_device: int = 1) -> dict[str, dict[str, str]]:
    """Environment of every worker, by worker name.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES; none: the CPU is the one device.
        per_device: workers that share a device, and the cores that are its share.
    """
    devices = [(f"gpu-{i}", {"CUDA_VISIBLE_DEVICES": gpu}) for i, gpu in enumerate(gpus)]
    devices = devices or [("cpu", {})]
    count = len(devices) * per_device
    threads = {}
    if gpus or per_device > 1:
        share = str(max(1, (os.cpu_count() or 1) // count))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    return {
        name if per_device == 1 else f"{name}-{k}": environment | threads
        for name, environment in devices
        for k in range(per_device)
    }


async def _start_worker(
    scheduler: str, security: Security, name: str, env: dict[str, str]
) -> Nanny:
    return await Nanny(
        scheduler,
        name=name,
        nthreads=1,
        memory_limit=0,
        resources={"device": 1},
        env=env,
        security=security,
        protocol="tls",
        host="127.0.0.1",
        dashboard=False,
        dashboard_address="127.0.0.1:0",
        preload=["zo_core.worker"],
    )


async def serve(announce: int, owner: int) -> None:
    """Run scheduler and workers until the owner is gone.

    Args:
        announce: file descriptor that gets the address line.
        owner: process id of the owner.
    """
    security = Security.temporary()
    specs = worker_specs(visible_gpus(), settings().workers_per_device)
    async with Scheduler(
        host="127.0.0.1",
        port=0,
        protocol="tls",
        security=security,
        dashboard=False,
        dashboard_address="127.0.0.1:0",
        # A job whose worker died is handed out again, and the worker then declares it
        # interrupted. Dask giving up by itself would only add a second, vaguer verdict.
        allowed_failures=1_000_000,
    ) as scheduler:
        workers = dict(
            zip(
                specs,
                await asyncio.gather(
                    *(_start_worker(scheduler.address, security, n, e) for n, e in specs.items())
                ),
                strict=True,
            )
        )
        address = EngineAddress(
            scheduler.address,
            len(workers),
            Process.current(),
            security.tls_ca_file,
            security.tls_client_cert,
            security.tls_client_key,
        )
        with os.fdopen(announce, "w") as pipe:
            pipe.write(address.to_json() + "\n")
        backoff = WATCH_EVERY
        while os.getppid() == owner:
            await asyncio.sleep(WATCH_EVERY)
            for name, worker in workers.items():
                # A manager gives up when its worker process cannot start again.
                if worker.status in (Status.closed, Status.failed):
                    await asyncio.sleep(backoff)
                    backoff = min(2 * backoff, MAX_BACKOFF)
                    with suppress(Exception):
                        workers[name] = await _start_worker(
                            scheduler.address, security, name, specs[name]
                        )
    leave()


def leave() -> None:
    """End this process and its workers at once; what they wrote is on disk already."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


def _leave_with_owner() -> None:
    sys.stdin.buffer.read()
    leave()


def main() -> None:
    """Entry point of ``python -m zo_core.engine``."""
    owner = os.getppid()
    # Only the address line may reach the owner: everything else, also from workers, is the log.
    announce = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_owner, name="zo-owner", daemon=True).start()
    dask.config.set(DASK_CONFIG)
    asyncio.run(serve(announce, owner))


if __name__ == "__main__":
    main()
