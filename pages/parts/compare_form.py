"""The form of a comparison: a preset with the usual fields, or a YAML file."""

import re
from typing import Any

import streamlit as st

from pages.parts.choice import Choice
from pages.parts.forms import data_folder
from pages.parts.words import plain
from zo_core import backend
from zo_core.compare import store
from zo_core.compare.claims import claims_asked
from zo_core.compare.detach import start_driver
from zo_core.compare.files import (
    as_yaml,
    command_of,
    make_spec,
    parse_fields,
    placed,
    read_fields,
)
from zo_core.compare.power import power_note
from zo_core.compare.presets import PRESETS
from zo_core.compare.spec import CompareSpec
from zo_core.errors import UserError
from zo_core.tasks.catalog import TASKS

YAML = "yaml"
DEFAULTS = CompareSpec.model_fields
UPLOAD_MIB = 1
SPAN = re.compile(r"^(\d{1,9})-(\d{1,9})$")
WIDEST = 1000
"""Seeds that a span like 0-4 may hold."""
EXAMPLE = """title: is the first outlier layer better than layer 10?
tasks: [reviews]
seeds: [0, 1, 2, 3, 4, 5, 6]
steps: 100
arms:
  - {name: zero-shot, scope: zero-shot}
  - {name: full, scope: full}
  - {name: dominant, scope: 'layer:auto'}
  - {name: 'layer 10', scope: 'layer:10', lr: [2.0e-4, 5.0e-4]}
"""


def form(choice: Choice) -> None:
    """The whole form, with what it will cost, the command and the button."""
    st.session_state.setdefault("compare_source", "quick")
    # Set by the button that turns a preset into YAML: a widget's own key cannot be, once drawn.
    source = st.session_state.pop("compare_source_next", None)
    if source is not None:
        st.session_state["compare_source"] = source
    source = st.segmented_control(
        "Start from",
        [*PRESETS, YAML],
        format_func=lambda name: "Own YAML" if name == YAML else name,
        key="compare_source",
        required=True,
        persist_state="session",
    )
    spec, problem, command = None, "", ""
    try:
        if source == YAML:
            fields, over = _yaml_fields(), _model(choice)
            inner = fields.get("common")
            said = fields | inner if isinstance(inner, dict) else fields
            over = {n: v for n, v in over.items() if n not in said}
            command = command_of("spec.yaml", {}, over)
        else:
            fields = _preset(source, choice.model, choice.revision)
            st.caption(plain(fields["title"].partition(": ")[2].capitalize() + "."))
            over = _common_fields(source, fields) | _model(choice)
            command = command_of(source, fields, over)
        spec = _checked(make_spec(fields, over).model_dump_json())
    except UserError as error:
        problem = str(error)
    if spec is not None:
        st.caption(_cost(spec))
        if source == YAML:
            st.caption("The command below reads this text, saved as spec.yaml.")
        else:
            _as_file(spec)
    _launch(spec, command, problem)


@st.cache_data(ttl=600, max_entries=32, show_spinner="Reading the model's configuration")
def _preset(source: str, model: str, revision: str | None) -> dict[str, Any]:
    return read_fields(source, model, revision)


@st.cache_data(ttl=5, max_entries=8, show_spinner=False)
def _checked(spec: str) -> CompareSpec:
    return placed(CompareSpec.model_validate_json(spec))


def _model(choice: Choice) -> dict[str, Any]:
    """The chosen model, in the fields that differ from the defaults."""
    default = Choice().fields()
    return {n: v for n, v in choice.fields().items() if v != default[n]}


def _common_fields(source: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The usual fields of a preset, as they stand in the form.

    Raises:
        UserError: a list of numbers is none.
    """
    key = f"compare_{source}"
    given: dict[str, Any] = {}
    with st.container(horizontal=True):
        given["tasks"] = st.multiselect(
            "Tasks",
            list(TASKS),
            default=fields.get("tasks", DEFAULTS["tasks"].default),
            format_func=lambda task: TASKS[task].title,
            key=f"{key}_tasks",
            width=330,
            persist_state="session",
        )
        seeds = st.text_input(
            "Seeds",
            value=",".join(map(str, fields["seeds"])),
            key=f"{key}_seeds",
            width=150,
            help="As 0,1,2 or 0-4",
            persist_state="session",
        )
        given["steps"] = st.number_input(
            "Steps",
            value=fields["steps"],
            step=1,
            key=f"{key}_steps",
            width=120,
            help="Of zo-sgd: other optimizers get as many forward passes",
            persist_state="session",
        )
        factors = st.text_input(
            "Learning rate factors",
            value=",".join(
                f"{f:g}" for f in fields.get("lr_factors", DEFAULTS["lr_factors"].default)
            ),
            key=f"{key}_factors",
            width=180,
            help="The grid around the recommended rate; one factor: no search",
            persist_state="session",
        )
        search = st.number_input(
            "Search steps (empty: as steps)",
            value=fields.get("search_steps"),
            step=1,
            key=f"{key}_search_steps",
            width=220,
            help="For each learning rate that is tried. A short search favours rates that are too "
            "large for a longer run",
            persist_state="session",
        )
        folder = data_folder("compare")
    given["seeds"] = _numbers("seeds", seeds)
    given["lr_factors"] = _numbers("lr_factors", factors)
    given["steps"] = fields["steps"] if given["steps"] is None else given["steps"]
    if search is not None:
        given["search_steps"] = search
    elif fields.get("search_steps") is not None:  # emptied by the user
        given["search_steps"] = given["steps"]
    if folder is not None:
        given["data_dir"] = folder
    return given


def _numbers(name: str, text: str) -> list[Any]:
    """``0,1,4-6`` as numbers; what is no number is left for the spec to refuse.

    Raises:
        UserError: the field is empty, or a span is too wide.
    """
    found: list[Any] = []
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        span = SPAN.match(part)
        if span and int(span[1]) <= int(span[2]):
            if int(span[2]) - int(span[1]) >= WIDEST:
                raise UserError(f"{name}: {part} are more than {WIDEST}: give fewer.")
            found.extend(range(int(span[1]), int(span[2]) + 1))
        else:
            found.append(_number(part))
    if not found:
        raise UserError(f"{name} is empty: give at least one, for example 0,1,2.")
    return found


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _yaml_fields() -> dict[str, Any]:
    """The fields of the YAML in the editor.

    Raises:
        UserError: it is none.
    """
    st.session_state.setdefault("compare_yaml", EXAMPLE)
    st.file_uploader(
        "Upload YAML",
        type=["yaml", "yml", "json"],
        key="compare_upload",
        max_upload_size=UPLOAD_MIB,
        on_change=_take_upload,
        width=420,
    )
    text = st.text_area(
        "Comparison (YAML; fields in docs/compare.md)",
        key="compare_yaml",
        height=280,
        persist_state="session",
    )
    return parse_fields(text, "The YAML")


def _take_upload() -> None:
    uploaded = st.session_state["compare_upload"]
    if uploaded is not None:
        st.session_state["compare_yaml"] = uploaded.getvalue().decode("utf-8", errors="replace")


def _as_file(spec: CompareSpec) -> None:
    """The spec of a preset as YAML, to look at or to go on with."""
    text = as_yaml(spec)
    with st.expander("As YAML", icon=":material/code:", key="compare_as_yaml"):
        if st.button("Edit this", key="edit_yaml", icon=":material/edit:"):
            st.session_state["compare_yaml"] = text
            st.session_state["compare_source_next"] = YAML
            st.rerun()
        st.code(text, language="yaml", height=260)


def _cost(spec: CompareSpec) -> str:
    """How many runs a comparison has, and what their number can tell."""
    tuned = [arm for arm in spec.arms if arm.tunes]
    final = len(spec.tasks) * len(spec.seeds) * len(tuned)
    grids = [spec.grid(arm) for arm in tuned]
    least = len(spec.tasks) * sum(len(grid) for grid in grids if len(grid) > 1)
    most = len(spec.tasks) * sum(spec.most_tries(a) for a in tuned if len(spec.grid(a)) > 1)
    text = f"{final:,} runs of {spec.budget():,} forward passes"
    if least:
        text += (
            f", before them {least:,} to {most:,} of {spec.budget(searching=True):,} that choose "
            "learning rates"
        )
    decided = [key for key in claims_asked(spec) if key != "e"]
    units = len(spec.tasks) * len(spec.seeds)
    note = power_note(units, len(decided), spec.alpha) if decided else "No claim is asked."
    return f"{text}. {note}"


def _launch(spec: CompareSpec | None, command: str, problem: str) -> None:
    with st.container(horizontal=True, vertical_alignment="top", key="start_comparison_row"):
        clicked = st.button(
            "Compare", key="start_comparison", type="primary", icon=":material/play_arrow:"
        )
        with st.container(key="start_comparison_command"):
            if problem:
                alert = st.error if clicked else st.warning
                alert(plain(problem), icon=":material/error:")
            else:
                st.code(command, language="bash", wrap_lines=True)
    if clicked and spec is not None and not problem:
        try:
            comparison = store.create(spec, command)
            backend.start(share=True)
            start_driver(comparison)
        except (UserError, OSError) as error:
            st.error(plain(str(error)), icon=":material/error:")
            return
        st.query_params["comparison"] = comparison.comparison_id
        st.rerun()
