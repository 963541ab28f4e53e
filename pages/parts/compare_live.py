"""A comparison at work: its state, its buttons, and the table of cells that fills in."""

import html
from collections import defaultdict
from typing import Any

import streamlit as st

from pages.parts import comparisons
from pages.parts.words import clock, duration, plain
from zo_core import backend
from zo_core.compare import detach
from zo_core.compare.files import as_yaml
from zo_core.compare.spec import CompareSpec
from zo_core.compare.status import SessionStatus
from zo_core.compare.store import Comparison
from zo_core.errors import UserError

LOOKS = {
    "waiting": ("·", "transparent"),
    "running": ("", "rgba(86,180,233,.35)"),
    "done": ("", "rgba(0,158,115,.28)"),
    "failed": ("✕", "rgba(213,94,0,.45)"),
    "diverged": ("↗", "rgba(204,121,167,.45)"),
    "cancelled": ("–", "rgba(138,148,160,.3)"),
    "interrupted": ("–", "rgba(138,148,160,.3)"),
}
"""Sign and colour of a cell by state; colours that light and dark both bear."""
STYLE = """<style>
.zo-cells { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
.zo-cells > div { overflow-x: auto; max-width: 100%; }
.zo-cells table { border-collapse: separate; border-spacing: 3px; font-size: 12.5px; }
.zo-cells caption { text-align: left; font-weight: 600; padding: 0 3px 4px; }
.zo-cells th { font-weight: 500; text-align: left; padding: 1px 8px 1px 0; white-space: nowrap; }
.zo-cells thead th { opacity: .7; text-align: center; padding: 0; }
.zo-cells td { min-width: 42px; height: 22px; text-align: center; border-radius: 3px;
  border: 1px solid rgba(138,148,160,.4); font-variant-numeric: tabular-nums; }
.zo-cells td.rate { border: none; text-align: right; opacity: .8; padding-right: 6px; }
.zo-cells td a { color: inherit; text-decoration: none; display: block; }
</style>"""


def follow(comparison: Comparison) -> None:
    """Draw the state and the cells, each second while a process works on it."""
    live = comparison.status().live

    def tick() -> None:
        status = comparison.status()
        header(comparison, status)
        cells(comparison, status)
        if status.live != live:
            st.rerun()

    st.fragment(tick, run_every=1.0 if live else None)()


def header(comparison: Comparison, status: SessionStatus) -> None:
    """Title, state, progress, and the buttons that the state allows."""
    with st.container(key="comparison_header", border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            comparisons.badge(status.state)
            st.markdown(f"**{plain(comparisons.title(comparison))}**", width="content")
            st.space("stretch")
            with st.popover("Details", icon=":material/info:", key="comparison_details"):
                _details(comparison)
            if status.live:
                _cancel(comparison)
            elif status.state != "done" or status.failed:
                _resume(comparison, "Try failed again" if status.state == "done" else "Resume")
        if status.live:
            st.progress(_share(status), text=plain(_progress(status)))
        elif status.state == "failed":
            st.error(plain(status.error), icon=":material/error:")
        elif status.state in ("cancelled", "interrupted"):
            reached = comparisons.progress(status)
            st.warning(
                f"{status.state.capitalize()}{f' after {reached}' if reached else ''}. Nothing is "
                "lost: Resume goes on where it stopped and repeats no finished cell."
            )
        else:
            took = duration((status.finished or status.updated) - status.started)
            st.caption(f"{comparisons.progress(status)} done{status.losses} · last session {took}")


def _share(status: SessionStatus) -> float:
    return min(1.0, status.settled / status.total) if status.total else 0.0


def _progress(status: SessionStatus) -> str:
    if status.state == "starting" or not status.total:
        return "Starting"
    done = f"{status.done} of {status.total} cells done{status.losses}"
    parts = [done, f"{status.running} running"]
    if status.eta is not None:
        parts.append(f"about {duration(status.eta)} left")
    return " · ".join(parts)


def _cancel(comparison: Comparison) -> None:
    asked = comparison.cancel_requested
    if st.button(
        "Cancelling…" if asked else "Cancel",
        key="cancel_comparison",
        icon=":material/stop:",
        disabled=asked,
    ):
        comparison.request_cancel()
        st.rerun(scope="fragment")


def _resume(comparison: Comparison, label: str) -> None:
    if st.button(label, key="resume_comparison", icon=":material/restart_alt:"):
        try:
            backend.start(share=True)
            detach.start_driver(comparison)
        except (UserError, OSError) as error:
            st.error(plain(str(error)), icon=":material/error:")
        else:
            st.rerun()


def _details(comparison: Comparison) -> None:
    st.markdown(f"Comparison `{comparison.comparison_id}`")
    st.caption(f"created {clock(comparison.created)} · {plain(str(comparison.path))}")
    st.code(comparison.command, language="bash", wrap_lines=True)
    st.code(as_yaml(comparisons.spec_of(comparison)), language="yaml", height=240)
    log = detach.log_text(comparison)
    if log:
        st.code(log, language=None, height=200)


def cells(comparison: Comparison, status: SessionStatus) -> None:
    """Arm x seed, a table a task: what waits, runs, is done or failed."""
    progress = comparison.read_json("progress.json")
    if progress is None:
        st.caption("The table of cells appears once the driver has started.")
        return
    with st.container(key="comparison_cells"):
        st.html(cells_html(comparisons.spec_of(comparison), progress, status.live))
        st.caption(
            "Numbers: the task's metric on validation rows after tuning, in percent; shares: "
            "progress. ✕ failed, ↗ diverged, · waiting. A cell opens its run."
        )


def cells_html(spec: CompareSpec, progress: dict[str, Any], live: bool) -> str:
    """The tables of cells.

    Args:
        spec: the comparison.
        progress: ``progress.json``.
        live: a process works on it; else nothing runs, whatever the file says.
    """
    final = {(c["task"], c["arm"], c["seed"]): c for c in progress["final"]}
    search: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in progress["search"]:
        search[cell["task"], cell["arm"]].append(cell)
    chosen = {(c["task"], c["arm"]): c for c in progress["choices"]}
    tables = []
    for task in spec.tasks:
        head = "".join(f"<th>{seed}</th>" for seed in spec.seeds)
        rows = []
        for arm in spec.arms:
            if not arm.tunes:
                continue
            rate = _rate(chosen.get((task, arm.name)), search[task, arm.name])
            row = "".join(_cell(final.get((task, arm.name, seed)), live) for seed in spec.seeds)
            rows.append(f"<tr><th>{html.escape(arm.name)}</th>{rate}{row}</tr>")
        tables.append(
            f"<div><table><caption>{html.escape(task)}</caption><thead><tr><th>arm, seed</th>"
            f"<th>lr</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    extra = "".join(
        f"<tr><th>{html.escape(' '.join(filter(None, (c['kind'], c['task']))))}</th>"
        f"{_cell(c, live)}</tr>"
        for c in progress["profiles"]
    )
    if extra:
        tables.append(
            f"<div><table><caption>profiles</caption><tbody>{extra}</tbody></table></div>"
        )
    return f'{STYLE}<div class="zo-cells">{"".join(tables)}</div>'


def _rate(choice: dict[str, Any] | None, tries: list[dict[str, Any]]) -> str:
    """The chosen learning rate, or how far its search is."""
    settled = sum(c["state"] in ("done", "failed", "diverged") for c in tries)
    losses = "; ".join(
        f"{c['lr']:g}: " + ("no" if c["dev_loss"] is None else f"{c['dev_loss']:.4f}")
        for c in tries
        if c.get("dev_loss") is not None or c["state"] in ("failed", "diverged")
    )
    hint = html.escape(f"dev loss by rate: {losses}" if losses else "", quote=True)
    if choice is None:
        text = f"{settled} of {len(tries)}" if tries else ""
    elif choice["lr"] is None:
        text = "none"
    else:
        text = f"{choice['lr']:.3g}" + (" (edge)" if choice["at_edge"] else "")
    return f'<td class="rate" title="{hint}">{text}</td>'


def _cell(cell: dict[str, Any] | None, live: bool) -> str:
    state = cell["state"] if cell else "waiting"
    if state == "running" and not live:
        state = "interrupted"
    text, colour = LOOKS.get(state, LOOKS["waiting"])
    hint = state
    if cell is not None:
        if state == "running":
            text = f"{100 * cell['share']:.0f} %"
        elif state == "done":
            value = cell.get("value")
            text = "✓" if value is None else f"{100 * value:.1f}"
        hint = ": ".join(filter(None, (state, cell["error"])))
        if cell["run_id"]:
            page = {"scan": "outliers", "probe": "sensitivity"}.get(cell.get("kind", ""), "")
            link = f"{page or 'fine_tune'}?run={html.escape(cell['run_id'], quote=True)}"
            text = f'<a href="{link}">{text}</a>'
    return f'<td style="background:{colour}" title="{html.escape(hint, quote=True)}">{text}</td>'
