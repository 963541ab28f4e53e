"""One process's connection to the engine, driven by one background thread.

The thread finds or starts the engine, hands runs to Dask, and does so again when the engine is
gone. Callers never wait for it. Dask is imported in the thread: it takes half a second.
"""

import logging
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from zo_core import engine_state, worker
from zo_core.engine_state import EngineAddress
from zo_core.errors import UserError
from zo_core.failures import disk_sentence
from zo_core.runs import Run
from zo_core.settings import ROOT, settings

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_TIMEOUT = 10.0
START_TIMEOUT = 90.0
RETRY_EVERY = 20.0
"""Seconds before :func:`Connection.start` tries again by itself; a new job tries at once."""
LOG_LIMIT = 1 << 20


class BackendError(UserError):
    """The engine or the run store cannot do what was asked; the text says why and what to do."""


class Connection:
    """The engine as this process sees it."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._state, self._sentence = "idle", "The engine starts with the first job."
        self._todo: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._share = False
        self._retry_at = 0.0
        self._closing = False
        self._client: Client | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._address: EngineAddress | None = None
        """None for a remote engine."""
        self._futures: dict[Any, Future] = {}

    # -- called by anyone ---------------------------------------------------------------------

    def start(self, share: bool) -> None:
        """Have the thread connect, unless it has or tried a moment ago."""
        state, _ = self.status()
        with self._lock:
            if share and not self._share:
                self._share = True
                self._publish()
            if state in ("starting", "ready") or time.monotonic() < self._retry_at:
                return
        self._ask(None)

    def queue(self, run: Run) -> None:
        """Have the thread hand a run to the engine."""
        self._ask(run)

    def _ask(self, run: Run | None) -> None:
        with self._lock:
            if self._state != "ready":
                self._state, self._sentence = "starting", "The engine is starting."
            self._retry_at = time.monotonic() + RETRY_EVERY
            self._todo.put(run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="zo-engine", daemon=True)
                self._thread.start()

    def status(self) -> tuple[str, str]:
        """State and sentence, with an engine that has died since found out."""
        with self._lock:
            if self._state == "ready" and not self._alive():
                self._state = "failed"
                self._sentence = "The engine stopped; it starts again with the next job."
            return self._state, self._sentence

    def close(self) -> None:
        """Disconnect; an engine of our own ends with its workers. Never takes long."""
        self._closing = True
        child = self._child
        if child is not None:
            _end(child)  # also wakes the thread if it waits for the engine's address
        thread = self._thread
        if thread is not None:
            self._todo.put(None)
            thread.join(3)
        self._drop()

    # -- the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing:
            run = self._todo.get()
            if self._closing:
                return
            try:
                client = self._connect()
                if run is not None:
                    self._hand_over(client, run)
            except Exception as error:
                if self._closing:
                    return
                sentence = (
                    str(error)
                    if isinstance(error, UserError)
                    else f"The engine cannot be used: {type(error).__name__}: {error}."
                )
                self._drop()
                with self._lock:
                    self._state, self._sentence = "failed", sentence
                if run is not None:
                    fail(run, sentence)

    def _alive(self) -> bool:
        return (
            self._client is not None
            and self._client.status == "running"
            and (self._child is None or self._child.poll() is None)
            and (self._address is None or not self._address.process.is_dead())
        )

    def _connect(self) -> "Client":
        if self._client is not None and self._alive():
            return self._client
        self._drop()
        with self._lock:
            self._state, self._sentence = "starting", "The engine is starting."
        _quiet_dask()
        if settings().backend:
            client, sentence = self._join_remote(settings().backend)
        else:
            client, sentence = self._join_shared() or self._launch()
        with self._lock:
            self._client = client
            self._state, self._sentence = "ready", sentence
        return client

    def _join_remote(self, address: str) -> "tuple[Client, str]":
        from distributed import Security

        try:
            parts = urlsplit(address)
            valid = parts.scheme in ("tcp", "tls") and parts.hostname and parts.port
        except ValueError:
            valid = False
        if not valid:
            raise BackendError(
                f"ZO_BACKEND={address!r} is no scheduler address: use tcp://host:8786 or "
                "tls://host:8786, or unset it to use this machine."
            )
        security = Security()
        keys = security.get_tls_config_for_role("client")
        if parts.scheme == "tls" and not (keys["ca_file"] and keys["cert"]):
            raise BackendError(
                "ZO_BACKEND asks for tls:// but no certificates are configured: set "
                "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._TLS__CLIENT__CERT and "
                "..._TLS__CLIENT__KEY."
            )
        try:
            client = _client(address, security)
        except (OSError, TimeoutError) as error:
            raise BackendError(
                f"No Dask scheduler answers at {address}: check that it runs and can be reached, "
                "or unset ZO_BACKEND to use this machine."
            ) from error
        found = client.scheduler_info(n_workers=-1)["workers"].values()
        ready = sum(1 for w in found if w.get("resources", {}).get("device"))
        if not ready:
            return client, (
                f"Connected to {address}, but no worker offers a device: start one with "
                "`dask worker ... --resources device=1`; jobs wait until then."
            )
        return client, f"Connected to {address} with {_count(ready)}."

    def _join_shared(self) -> "tuple[Client, str] | None":
        address = engine_state.find_shared_engine()
        if address is None:
            return None
        try:
            client = _client_of(address)
        except (OSError, TimeoutError):
            return None
        self._address = address
        return client, "Using the engine that the app shares."

    def _launch(self) -> "tuple[Client, str]":
        child = self._child = _spawn()
        # A start that hangs is ended, which ends the wait for its address below.
        timer = threading.Timer(START_TIMEOUT, child.kill)
        timer.daemon = True
        timer.start()
        with cast("IO[bytes]", child.stdout) as pipe:
            line = pipe.readline().decode()
        timer.cancel()
        if not line:
            raise BackendError(
                "The engine did not start; the reason is at the end of "
                f"{settings().engine_dir / 'engine.log'}."
            )
        address = self._address = EngineAddress.from_json(line)
        client = _client_of(address)
        if self._share:
            self._publish()
        return client, f"Running on this machine with {_count(address.workers)}."

    def _publish(self) -> None:
        if self._child is not None and self._address is not None:
            with suppress(OSError):  # sharing is a convenience
                engine_state.share_engine(self._address)

    def _hand_over(self, client: "Client", run: Run) -> None:
        from distributed import fire_and_forget

        owner = self._address.process if self._address else None
        if not run.transition(("queued",), process=owner):
            return  # cancelled while the engine started
        future = client.submit(
            worker.execute,
            run.run_id,
            str(run.path.parent.resolve()),
            key=f"{run.run_id}-{secrets.token_hex(3)}",  # new at each resume
            pure=False,
            resources={"device": 1},
            fifo_timeout=0,  # first come, first served, also within a tenth of a second
        )
        # Kept by the scheduler even when this process leaves a shared engine.
        fire_and_forget(future)
        self._futures[future.key] = future
        future.add_done_callback(lambda done: self._settle(run, done))

    def _settle(self, run: Run, future: "Future") -> None:
        """Called when Dask is done with a job; the worker has settled the run, or could not."""
        self._futures.pop(future.key, None)
        if future.status == "error" and not self._closing:
            fail(
                run,
                "The worker could not take the job: it must see the same run store under "
                f"{run.path.parent} and the same version of this project "
                f"({type(future.exception()).__name__}: {future.exception()}).",
            )

    def _drop(self) -> None:
        client, self._client = self._client, None
        child, self._child = self._child, None
        address, self._address = self._address, None
        self._futures.clear()
        if child is not None:
            _end(child)
            if address is not None:
                engine_state.unshare_engine(address)
        if client is not None:
            with suppress(Exception):
                client.close(timeout=2)


def fail(run: Run, sentence: str) -> None:
    """Set a live run failed; a disk too full for that leaves it to be found interrupted."""
    with suppress(OSError):
        run.release_reserve()
        if run.transition(
            ("queued", "running"), state="failed", error=sentence, finished=time.time()
        ):
            run.log(sentence)


def _spawn() -> subprocess.Popen[bytes]:
    folder = settings().engine_dir
    environment = dict(os.environ)
    # The worker must find this project and the same run store wherever it was started from.
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["ZO_CACHE_DIR"] = str(settings().cache_dir.resolve())
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # libgomp's threads spin for milliseconds while they wait, which on a shared machine makes all
    # of its users several times slower; this short spin costs nothing measurable on an idle one.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "engine.log"
        fresh = not log.exists() or log.stat().st_size > LOG_LIMIT
        with log.open("wb" if fresh else "ab") as errors:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "zo_core.engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise BackendError(
            disk_sentence(error) or f"The engine cannot be started: {error}."
        ) from error


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End an engine process: it leaves when its standard input closes."""
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
    try:
        child.wait(3)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.wait(1)


def _client_of(address: EngineAddress) -> "Client":
    from distributed import Security

    security = Security(
        require_encryption=True,
        tls_ca_file=address.ca,
        tls_client_cert=address.cert,
        tls_client_key=address.key,
    )
    return _client(address.address, security)


def _client(address: str, security: Any) -> "Client":
    from distributed import Client

    return Client(
        address, security=security, timeout=CONNECT_TIMEOUT, set_as_default=False, name="zoscope"
    )


def _quiet_dask() -> None:
    """Keep Dask's remarks about lost connections off the terminal; our sentences say the same."""
    import distributed  # noqa: F401 - sets its loggers up when imported

    for name in ("distributed", "distributed.client", "distributed.comm", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
