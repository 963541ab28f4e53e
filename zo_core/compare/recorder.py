"""What readers of a comparison see: status, cells, tables and curves, kept up to date on disk.

``status.json`` and ``progress.json`` are replaced about once a second. Tables and curves are
computed here, in the process that drives the comparison, so that a page only reads them.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zo_core.compare.curves import Curves
from zo_core.compare.results import collect
from zo_core.compare.status import State
from zo_core.compare.store import Comparison
from zo_core.compare.tables import as_dict, write_tables
from zo_core.export import parquet_bytes
from zo_core.runs import Process, to_json

if TYPE_CHECKING:
    from zo_core.compare.driver import Snapshot

WRITE_EVERY = 1.0
TABLES_EVERY = 5.0
"""Seconds between tables at least: they are made anew once a cell has ended."""
TABLES_SHARE = 20
"""Tables take at most one part in so many of the driver's time."""


class Recorder:
    """One session's reports; made and used while the comparison is locked."""

    def __init__(
        self, comparison: Comparison, cells: Callable[[], Mapping[str, list[dict[str, Any]]]]
    ) -> None:
        """Say that the session runs, and write the tables as they are now.

        Args:
            comparison: the comparison.
            cells: gives the records of ``progress.json``.
        """
        self._comparison, self._cells = comparison, cells
        self._curves = Curves()
        me = Process.current()
        if comparison.status().process != me:  # else whoever started this process has said so
            comparison.begin(me)
        self._status = replace(comparison.status(), state="running", process=me)
        self._write_at = self._tables_at = 0.0
        self._settled = -1
        comparison.update(self._status)
        self._publish()

    def __call__(self, now: "Snapshot") -> None:
        """Take a snapshot; files are written now and then."""
        self._status = replace(
            self._status,
            total=now.total,
            done=now.done,
            failed=now.failed,
            diverged=now.diverged,
            running=now.running,
            eta=now.eta,
            message=now.message,
        )
        moment = time.monotonic()
        with suppress(OSError):  # what is shown is not worth the cells
            if moment >= self._write_at:
                self._write_at = moment + WRITE_EVERY
                self._write()
            if self._status.settled != self._settled and moment >= self._tables_at:
                self._settled = self._status.settled
                self._publish()

    def end(self, state: State, error: str = "") -> None:
        """Write everything for the last time.

        Raises:
            OSError: the folder cannot be written.
        """
        self._publish()
        self._status = replace(
            self._status, state=state, error=error, running=0, eta=None, finished=time.time()
        )
        self._write()

    def _write(self) -> None:
        self._comparison.write("progress.json", to_json(self._cells()))
        self._comparison.update(self._status)

    def _publish(self) -> None:
        began = time.monotonic()
        results = collect(self._comparison)
        write_tables(self._comparison, as_dict(self._comparison, results))
        self._comparison.write("curves.parquet", parquet_bytes(self._curves.table(results)))
        took = time.monotonic() - began
        self._tables_at = time.monotonic() + max(TABLES_EVERY, TABLES_SHARE * took)
