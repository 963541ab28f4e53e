"""The sidebar's view of the engine: state, device, resident models, running and queued jobs."""

import streamlit as st

from pages.parts import comparisons, history
from pages.parts.routes import PAGE_OF_KIND, PAGES
from pages.parts.words import count, plain, shorten, size
from zo_core import backend

SECONDS = 2.0
ENGINE_STATES = {
    "idle": ("gray", "not started"),
    "starting": ("orange", "starting"),
    "ready": ("green", "ready"),
    "failed": ("red", "not available"),
}


@st.fragment(run_every=SECONDS)
def engine_panel() -> None:
    """Draw the panel and keep it fresh.

    It never reruns the app: its timer may fire for a page that the browser has just left, and the
    app would then run that page again, into a browser that shows another.
    """
    state, sentence = backend.engine_status()
    colour, word = ENGINE_STATES.get(state, ("gray", state))
    with st.container(key="engine_panel", gap="small"):
        st.markdown(f"**Engine** :{colour}[●] {word}")
        if state == "failed":
            st.error(sentence)
        for worker in backend.workers():
            _worker(worker)
        jobs, at_work = history.live(), comparisons.live()
        if jobs or at_work:
            st.markdown("**Jobs**")
        for comparison, status in at_work:
            st.page_link(
                PAGES["compare"],
                label=f"Comparison · {comparisons.progress(status) or status.state}",
                icon=":material/balance:",
                query_params={"comparison": comparison.comparison_id},
                help=plain(comparisons.title(comparison)),
            )
        for entry in jobs:
            _job(entry)


def _worker(worker: dict) -> None:
    device, name = worker.get("device"), worker.get("device_name")
    named = dict.fromkeys(word for word in (device, name) if word)
    lines = [" · ".join(named) or "worker is starting"]
    total, free = worker.get("device_memory"), worker.get("device_memory_free")
    if total and free is not None:
        lines.append(f"{size(total - free)} of {size(total)} device memory in use")
    if worker.get("worker_memory"):
        lines.append(f"worker memory {size(worker['worker_memory'])}")
    resident = worker.get("resident") or []
    lines += [
        f"resident: {shorten(str(model.get('model')), 28)} · {model.get('dtype')} · "
        f"{count(model.get('parameters') or 0)}"
        for model in resident
    ]
    if not resident:
        lines.append("no model loaded yet: the first job loads it")
    st.caption("  \n".join(plain(line) for line in lines))


def _job(entry: history.Entry) -> None:
    status = entry.status
    st.page_link(
        PAGE_OF_KIND[entry.job.kind],
        label=plain(entry.short),
        icon=":material/play_circle:" if status.state == "running" else ":material/schedule:",
        query_params={"run": entry.run_id},
        help=plain(entry.title) or None,
    )
