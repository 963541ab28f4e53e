"""One run on a page: choosing it, its state and progress, cancel, resume, log."""

from collections.abc import Callable

import streamlit as st

from pages.parts import history, launch
from pages.parts.choice import Choice
from pages.parts.routes import KIND_TITLES, PAGE_OF_KIND
from pages.parts.words import clock, duration, plain
from zo_core import backend, runs

STATES = {
    "queued": ("gray", ":material/schedule:"),
    "running": ("blue", ":material/play_circle:"),
    "done": ("green", ":material/check_circle:"),
    "failed": ("red", ":material/error:"),
    "cancelled": ("orange", ":material/cancel:"),
    "interrupted": ("orange", ":material/power_off:"),
}
LISTED = 100
"""Runs offered in a page's list; the Runs page has all."""


def pick(kind: str, choice: Choice) -> history.Entry | None:
    """The run that a page shows: the one in the URL, else the chosen model's newest useful one.

    Draws the list of runs of that kind, or the sentence that says why there is nothing to show.
    """
    wanted = st.query_params.get("run")
    entries = history.of_kind(kind)
    if wanted:
        try:
            run = runs.get(wanted)
        except runs.RunNotFoundError:
            st.error(
                f"There is no run {plain(wanted[:80])} in this run store: it may have been "
                "deleted. The Runs page lists all runs.",
                icon=":material/error:",
            )
            return None
        entry = history.read(run)
        if entry is None:
            st.error(f"The folder of run {run.run_id} is damaged: {plain(str(run.path))}.")
            return None
        if entry.job.kind != kind:
            st.info(f"Run {run.run_id} is of another kind: {KIND_TITLES[entry.job.kind].lower()}.")
            st.page_link(
                PAGE_OF_KIND[entry.job.kind],
                label="Open it there",
                icon=":material/open_in_new:",
                query_params={"run": run.run_id},
            )
            return None
    else:
        entry = history.preferred(kind, choice)
        if entry is None:
            return None
        st.query_params["run"] = entry.run_id
    listed = {e.run_id: e for e in entries[:LISTED]}
    listed[entry.run_id] = entry
    if len(listed) > 1:
        key = f"{kind}_run"
        st.session_state[key] = entry.run_id
        labels = history.labels(listed.values())
        st.selectbox(
            KIND_TITLES[kind],
            list(listed),
            format_func=labels.get,
            key=key,
            on_change=lambda: st.query_params.update(run=st.session_state[key]),
        )
    return entry


def follow(entry: history.Entry, draw: Callable[[history.Entry], None], every: float = 1.0) -> None:
    """Draw a run, again every ``every`` seconds while it is live, and the page once it ends."""
    live = entry.status.live

    def tick() -> None:
        now = history.read(entry.run)
        if now is None:
            st.info("This run was deleted.", icon=":material/delete:")
            return
        header(now)
        draw(now)
        if now.status.live != live:
            st.rerun()

    st.fragment(tick, run_every=every if live else None)()


def badge(state: str) -> None:
    """The state of a run as a coloured word."""
    colour, icon = STATES[state]
    st.badge(state, color=colour, icon=icon)


def header(entry: history.Entry) -> None:
    """Title, state, progress and the buttons that a run's state allows."""
    status, run = entry.status, entry.run
    with st.container(key="run_header", border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            badge(status.state)
            st.markdown(
                f"**{KIND_TITLES[entry.job.kind]}** · {plain(entry.title)}", width="content"
            )
            st.space("stretch")
            with st.popover("Details", icon=":material/info:", key="run_details"):
                _details(entry)
            if status.live:
                cancel_button(entry, key="cancel_run")
            elif (
                entry.job.kind == "tune"
                and status.state != "done"
                and (status.state != "failed" or status.step > 0)
                and st.button("Resume", key="resume_run", icon=":material/restart_alt:")
            ):
                launch.resume(run)
        if status.live:
            progress(entry)
        elif status.state == "failed":
            st.error(plain(status.error or "The run failed."), icon=":material/error:")
        elif status.state in ("interrupted", "cancelled"):
            reached = f" It reached {status.step:,} of {status.total:,}." if status.total else ""
            hint = " Resume goes on from the last step." if entry.job.kind == "tune" else ""
            st.warning(f"{plain(status.message or 'Cancelled.')}{reached}{hint}")


def progress(entry: history.Entry) -> None:
    """Progress bar and message of a live run."""
    status = entry.status
    if status.state == "queued":
        ahead = history.ahead(entry)
        text = f"Queued, {ahead} job{'' if ahead == 1 else 's'} ahead" if ahead else "Queued, next"
        if status.message:
            text += f" · {status.message}"
    else:
        text = status.message or "Running"
        if status.total and f"of {status.total}" not in text:
            text += f" · {status.step:,} of {status.total:,}"
        if (worked := entry.run.seconds_of_work(status)) is not None:
            text += f" · {duration(worked)}"
    done = status.step / status.total if status.total else 0.0
    st.progress(min(max(done, 0.0), 1.0), text=plain(text))


def cancel_button(entry: history.Entry, key: str) -> None:
    """A button that asks a live run to stop, and says that it was asked."""
    asked = entry.run.cancel_requested
    if st.button(
        "Cancelling…" if asked else "Cancel", key=key, icon=":material/stop:", disabled=asked
    ):
        try:
            backend.cancel(entry.run_id)
        except (backend.BackendError, runs.RunNotFoundError) as error:
            st.error(plain(str(error)))
        else:
            st.rerun(scope="fragment")


def _details(entry: history.Entry) -> None:
    status = entry.status
    st.markdown(f"Run `{entry.run_id}`")
    facts = [f"created {clock(status.created)}"]
    if (worked := entry.run.seconds_of_work(status)) is not None:
        facts.append(f"{duration(worked)} of work")
    if status.device:
        facts.append(f"on {status.device}")
    st.caption(" · ".join(facts))
    launch.command(entry.job)
    log = entry.run.log_text()
    if log:
        st.code(log[-4000:], language=None, height=240)
