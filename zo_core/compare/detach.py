"""Drive a comparison from a process of its own, which outlives the browser and the app.

The driver is the command line: ``compare --resume ID``. It uses the engine that the app shares;
when that ends with the app, it goes on with one of its own. The page sees it through the files of
the comparison's folder, and stops it through them.
"""

import os
import socket
import subprocess
import sys

import psutil

from zo_core.compare.store import Comparison
from zo_core.errors import UserError
from zo_core.runs import Process
from zo_core.settings import ROOT, settings

LOG = "driver.log"


def start_driver(comparison: Comparison) -> None:
    """Start or resume a comparison; returns at once.

    Raises:
        UserError: a process works on it already, or none can be started.
    """
    if comparison.status().live:
        raise UserError(f"Comparison {comparison.comparison_id} is running already.")
    environment = dict(os.environ)
    # As for the engine: the same project and run store, wherever the app was started.
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["ZO_CACHE_DIR"] = str(settings().cache_dir.resolve())
    try:
        with (comparison.path / LOG).open("wb") as log:
            child = subprocess.Popen(  # noqa: S603 - an id of the store's own
                [
                    *(sys.executable, "-P", "-m", "zo_core", "compare", "--resume"),
                    comparison.comparison_id,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        started = psutil.Process(child.pid).create_time()
        comparison.begin(Process(socket.gethostname(), child.pid, started))
    except OSError as error:
        raise UserError(f"The comparison cannot be started: {error}.") from error


def log_text(comparison: Comparison) -> str:
    """The end of what the latest detached driver said."""
    try:
        return (comparison.path / LOG).read_text(errors="replace")[-4000:]
    except OSError:
        return ""
