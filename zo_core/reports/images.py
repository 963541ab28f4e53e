"""Figures as PNG or SVG, drawn by a Chromium that is already on this machine.

Plotly draws in a browser. Headless Chromium opens a page with the figure, plotly turns it into an
image, and the page's text, which is then the image, is read back.
"""

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from zo_core.errors import UserError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Format = Literal["png", "svg"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_CHROMIUM = (
    "PNG and SVG need Chromium or Chrome on this machine, and none was found: install it, or take "
    "the figure as HTML."
)
PATIENCE = 60
"""Seconds until Chromium is given up."""

_PAGE = """<!doctype html><html><head><meta charset="utf-8"><script>{plotly}</script></head>
<body><div id="image">waiting</div><script>
const figure = {figure};
Plotly.toImage(figure, {{format: "{format}", width: {width}, height: {height}, scale: {scale}}})
  .then(url => document.getElementById("image").textContent = url,
        error => document.getElementById("image").textContent = "failed: " + error);
</script></body></html>"""


def find_chromium() -> str | None:
    """Where Chromium or Chrome is, or None; ``CHROMIUM`` names one in an unusual place."""
    named = os.environ.get("CHROMIUM")
    if named and Path(named).is_file():
        return named
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def image_bytes(
    figure: "go.Figure", form: Format, width: int = 1100, height: int | None = None, scale: int = 2
) -> bytes:
    """Draw a figure on white.

    Args:
        figure: a plotly figure.
        form: ``png`` or ``svg``.
        width: in pixels.
        height: in pixels; None: the figure's own, or 500.
        scale: pixels of a PNG for each of those; an SVG has no pixels.

    Raises:
        UserError: there is no Chromium, or it gives no image.
    """
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs

    chromium = find_chromium()
    if chromium is None:
        raise UserError(NO_CHROMIUM)
    white = go.Figure(figure).update_layout(
        template="plotly_white", paper_bgcolor="white", plot_bgcolor="white"
    )
    page = _PAGE.format(
        plotly=get_plotlyjs(),
        # A token's text may hold "</script>".
        figure=str(white.to_json()).replace("</", "<\\\\/"),
        format=form,
        width=width,
        height=height or white.layout.height or 500,
        scale=scale if form == "png" else 1,
    )
    with TemporaryDirectory(prefix="zoscope-image-") as folder:
        file = Path(folder) / "figure.html"
        file.write_text(page)
        text = _dump(chromium, file, Path(folder) / "profile")
    found = re.search(r'<div id="image">(.*?)</div>', text, re.DOTALL)
    url = found[1] if found else ""
    if url.startswith("data:image/png;base64,"):
        return base64.b64decode(url.partition(",")[2])
    if url.startswith("data:image/svg+xml,"):
        return unquote(url.partition(",")[2]).encode()
    raise UserError(f"Chromium drew no image: {url[:200] or 'it gave no answer'}.")


def _dump(chromium: str, page: Path, profile: Path) -> str:
    """The page's content once its scripts have run."""
    command = [
        chromium,
        "--headless",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        page.as_uri(),
    ]
    if os.geteuid() == 0:  # Chromium refuses to run as root inside its sandbox
        command.insert(1, "--no-sandbox")
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"Chromium at {chromium} did not draw: {error}.") from error
    return done.stdout.decode(errors="replace")
