"""Fields of the fine-tune form: numbers, choices and the advanced settings."""

from typing import get_args

import streamlit as st

from zo_core import scope_spec
from zo_core.jobs import TuneJob

FIELDS = TuneJob.model_fields


def numbered_layers(scope: str) -> list[int]:
    """The layers that a scope names by number; none while it is not valid."""
    try:
        return list(scope_spec.parse(scope).numbers)
    except ValueError:
        return []


def integers(values: dict, names: dict[str, str], width: int = 120) -> None:
    """Number fields of a job spec, by field name and label."""
    for name, label in names.items():
        values[name] = st.number_input(
            label,
            value=FIELDS[name].default,
            step=1,
            key=f"tune_{name}",
            width=width,
            help=FIELDS[name].description,
            persist_state="session",
        )


def options(values: dict, names: dict[str, str], width: int = 170) -> None:
    """Choices of a job spec, by field name and label."""
    for name, label in names.items():
        values[name] = st.selectbox(
            label,
            list(get_args(FIELDS[name].annotation)),
            index=get_args(FIELDS[name].annotation).index(FIELDS[name].default),
            key=f"tune_{name}",
            width=width,
            help=FIELDS[name].description,
            persist_state="session",
        )


def advanced(values: dict) -> None:
    """Optimizer, estimator, schedule, precision; what the optimizer does not use is hidden."""
    with st.container(horizontal=True):
        options(values, {"optimizer": "Optimizer"})
        optimizer = values["optimizer"]
        names = {"momentum": ("momentum",), "adamm": ("beta1", "beta2")}
        names["adamw"] = names["adamm"]
        for name in names.get(optimizer, ()):
            values[name] = st.number_input(
                name.capitalize(),
                value=FIELDS[name].default,
                step=0.01,
                format="%g",
                key=f"tune_{name}",
                width=120,
                persist_state="session",
            )
        integers(values, {"accumulate": "Micro-batches a step"}, width=170)
        if optimizer != "adamw":
            options(values, {"estimator": "Estimator", "noise": "Distribution of z"})
            integers(values, {"directions": "Directions a step"}, width=150)
    with st.container(horizontal=True):
        options(values, {"schedule": "Learning rate schedule"}, width=190)
        integers(values, {"warmup_steps": "Warm-up steps"}, width=150)
        options(values, {"precision": "Precision"})
        options(values, {"suffix": "Arithmetic above the tuned layer"}, width=250)
    with st.container(horizontal=True):
        options(values, {"keep": "Weights to keep"})
        integers(values, {"patience": "Patience (dev evaluations, 0: off)"}, width=240)
        values["track"] = st.multiselect(
            "Trackers",
            get_args(get_args(FIELDS["track"].annotation)[0]),
            key="tune_track",
            width=300,
            help=FIELDS["track"].description,
            persist_state="session",
        )
