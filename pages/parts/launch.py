"""From a form to a running job: one row with the button, the command and plain errors."""

from typing import Any

import streamlit as st
from pydantic import BaseModel, ValidationError

from pages.parts.words import plain
from zo_core import backend, runs
from zo_core.jobs import command_line, explain

_WITHOUT_PAGE = ("load", "unload")
"""Kinds that have no page of their own."""

LONG_COMMAND, COMMAND_HEIGHT = 400, 130
"""A command of more characters scrolls in a box of so many pixels."""


def launch_row(
    spec: type[BaseModel], values: dict[str, Any], label: str, key: str, problem: str = ""
) -> None:
    """Show the button of a job beside its equivalent command, and start the job on a click.

    Args:
        spec: the job spec class.
        values: its fields as the form gives them, valid or not.
        label: text of the button.
        key: key of the button.
        problem: what is wrong although the spec is valid, such as a layer the model lacks.
    """
    with st.container(horizontal=True, vertical_alignment="top", key=f"{key}_row"):
        clicked = st.button(label, key=key, type="primary", icon=":material/play_arrow:")
        with st.container(key=f"{key}_command"):
            job = None
            try:
                job = spec(**values)
            except ValidationError as error:
                problem = explain(error)
            if problem:
                alert = st.error if clicked else st.warning
                alert(plain(problem), icon=":material/error:")
            else:
                command(job)
    if clicked and not problem:
        submit(job)


def command(job: BaseModel) -> None:
    """The command line of a job, in a box that a long prompt does not stretch."""
    text = command_line(job)
    height = COMMAND_HEIGHT if len(text) > LONG_COMMAND else "content"
    st.code(text, language="bash", wrap_lines=True, height=height)


def submit(job: BaseModel) -> None:
    """Queue a job and show its run; a refusal is shown as a sentence."""
    try:
        run = backend.submit(job)
    except (backend.BackendError, OSError) as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    if job.kind in _WITHOUT_PAGE:
        st.rerun()
    show(run)


def resume(run: runs.Run) -> None:
    """Queue an ended tuning run again, from its last step."""
    try:
        show(backend.resume(run.run_id))
    except (backend.BackendError, runs.RunNotFoundError, OSError) as error:
        st.error(plain(str(error)), icon=":material/error:")


def show(run: runs.Run) -> None:
    """Put the run into the URL and draw the page again."""
    st.query_params["run"] = run.run_id
    st.rerun()
