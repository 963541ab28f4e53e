"""Rows of a task as the model gets them: rendered by the engine, scored tokens marked."""

import html
from typing import Any

import streamlit as st
from pydantic import ValidationError

from pages.parts import history
from pages.parts.choice import Choice
from pages.parts.words import plain
from zo_core import backend, runs
from zo_core.jobs import PreviewJob, TaskChoice, explain

LONGEST = 1500
"""Characters of a prompt that are shown: its end, which the answer follows."""


def preview(prefix: str, values: dict[str, Any], choice: Choice) -> None:
    """A button that renders five rows of the task in a form, and what came of it."""
    with st.expander("Preview rows", icon=":material/visibility:", key=f"{prefix}_preview"):
        st.caption(
            "Five training rows as the model gets them, with its tokenizer: the scored tokens are "
            "marked, the right answer is the one with a check mark."
        )
        if st.button("Preview", key=f"{prefix}_preview_start", icon=":material/play_arrow:"):
            _start(prefix, values, choice)
        run_id = st.session_state.get(f"{prefix}_preview_run")
        if run_id:
            _follow(run_id)


def _start(prefix: str, values: dict[str, Any], choice: Choice) -> None:
    names = {*TaskChoice.model_fields, "seed", "dev_examples"}
    fields = {name: value for name, value in values.items() if name in names}
    try:
        job = PreviewJob(**fields | choice.fields())
        st.session_state[f"{prefix}_preview_run"] = backend.submit(job).run_id
    except ValidationError as error:
        st.error(plain(explain(error)), icon=":material/error:")
    except (backend.BackendError, OSError) as error:
        st.error(plain(str(error)), icon=":material/error:")


def _follow(run_id: str) -> None:
    """Show the result, looking again each second until it is there."""

    def tick() -> None:
        try:
            entry = history.read(runs.get(run_id))
        except runs.RunNotFoundError:
            entry = None
        if entry is None:
            return
        if entry.status.live:
            waiting = entry.status.state == "queued" and history.ahead(entry)
            st.caption(f"Queued, {waiting} ahead." if waiting else "Rendering…")
        elif entry.status.state != "done":
            sentence = entry.status.error or entry.status.message or "The preview ended early."
            st.error(plain(sentence), icon=":material/error:")
        else:
            _show(entry.summary)
        if live and not entry.status.live:
            st.rerun()

    try:
        live = runs.get(run_id).status().live
    except (runs.RunNotFoundError, OSError, ValueError):
        return
    st.fragment(tick, run_every=1.0 if live else None)()


def _show(summary: dict[str, Any]) -> None:
    counts = ", ".join(f"{count:,} {split}" for split, count in summary["rows"].items())
    st.caption(f"Rows: {counts}.")
    for example in summary["examples"]:
        st.html(example_html(example))


def example_html(example: dict[str, Any]) -> str:
    """One example: its prompt, then each option with its scored tokens in ``mark`` elements."""
    prompt = example["candidates"][0]["prompt"]
    shown = prompt if len(prompt) <= LONGEST else f"…{prompt[-LONGEST:]}"
    lines = []
    for index, candidate in enumerate(example["candidates"]):
        sign = "✓" if index == example["label"] else "·"
        # A line break as a token is to be seen, too.
        tokens = (html.escape(t.replace("\n", "⏎")) for t in candidate["scored"])
        marks = "".join(f"<mark>{token}</mark>" for token in tokens)
        lines.append(f"{sign} {marks}")
    cut = "<em>cut on the left to fit the context</em>\n" if example["truncated"] else ""
    box = "white-space:pre-wrap;border-left:3px solid currentColor;padding-left:.8rem;margin:0"
    options = "\n".join(lines)
    return f'<pre style="{box}">{cut}{html.escape(shown)}\n<strong>{options}</strong></pre>'
