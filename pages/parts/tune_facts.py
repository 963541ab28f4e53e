"""The numbers of a tuning run: outcome before and after, speed, the best step, early stop."""

import streamlit as st

from pages.parts import curve, history
from pages.parts.words import count, duration, plain
from zo_core import plots
from zo_core.jobs import TuneJob
from zo_core.tasks.catalog import METRIC_NAMES

FIELDS = TuneJob.model_fields
ROUNDED_AWAY = 0.99
"""Share of weights that an update changes below which the page says that updates round away."""


def facts(entry: history.Entry, metrics: curve.Curve) -> None:
    """Main metric and loss before and after, speed, time left."""
    status, summary, metric = entry.status, entry.summary, entry.metric
    running = status.state == "running"
    evaluations = metrics.evals
    before = summary.get("before") or status.details.get("before") or evaluations.get(0)
    last = max(evaluations, default=0)
    after = summary.get("after") or (evaluations[last] if last else None)
    speed = summary.get("steps_per_second") or metrics.speed()
    left = (status.total - status.step) / speed if speed and running else None
    with st.container(horizontal=True, key="tune_facts"):
        for key, title, text in (
            (metric, f"Validation {METRIC_NAMES[metric]}", lambda e: history.percent(e, metric)),
            ("loss", "Validation loss", lambda e: plots.number(e["loss"]) if e.get("loss") else ""),
        ):
            shown = after or before
            delta = None
            if after and before and after.get(key) is not None and before.get(key) is not None:
                gain = after[key] - before[key]
                delta = f"{100 * gain:+.1f} points" if key == metric else f"{gain:+.3f}"
            start = text(before) if before else ""
            value = (
                f"{start} → {text(after)}" if after and before else (text(shown) if shown else "…")
            )
            if before and not after and start:
                value = f"{start} (before)"
            st.metric(
                title,
                value or "…",
                delta=delta,
                border=True,
                width=230,
                height="stretch",
                delta_color="normal" if key == metric else "inverse",
            )
        st.metric(
            "Steps a second",
            plots.number(speed) if speed else "…",
            border=True,
            width=150,
            height="stretch",
        )
        if running:
            st.metric(
                "Time left",
                duration(left) if left is not None else "…",
                border=True,
                width=150,
                height="stretch",
            )
        elif summary.get("seconds"):
            st.metric(
                "Time", duration(summary["seconds"]), border=True, width=150, height="stretch"
            )
        passes = metrics.columns["forward_passes"]
        st.metric(
            "Forward passes",
            f"{passes[-1]:,.0f}" if passes else "0",
            border=True,
            width=150,
            height="stretch",
        )
    notes = [f"scope {entry.scope}"]
    if not status.live and not summary.get("after"):
        notes.insert(
            0,
            f"last evaluated at step {last:,} of {status.total:,}"
            if after
            else "not evaluated after tuning",
        )
    notes = _dev_notes(entry, metrics) + notes
    tuned = summary.get("tuned_parameters") or status.details.get("tuned_parameters")
    if tuned:
        notes.append(f"{count(tuned)} tuned parameters")
    lr = summary.get("lr") or status.details.get("lr") or entry.job.effective_lr
    notes.append(f"learning rate {lr:g}")
    cut = sum((status.details.get("truncated") or {}).values())
    if cut:
        notes.append(f"{cut:,} rows cut on the left to fit the context")
    notes += status.details.get("out_of_memory") or []
    if entry.job.optimizer != FIELDS["optimizer"].default:
        notes.append(f"optimizer {entry.job.optimizer}")
    changed = summary.get("changed")
    if changed is not None and changed < ROUNDED_AWAY:
        notes.append(f"an update changes {100 * changed:.3g} % of the weights in this precision")
    path = summary.get("path") or status.details.get("path")
    if path:
        reason = summary.get("path_reason")
        notes.append(f"{path} path" + (f" ({reason})" if reason else ""))
    st.caption(plain(" · ".join(notes)))


def _dev_notes(entry: history.Entry, metrics: curve.Curve) -> list[str]:
    """What the dev rows decided: an early stop, and the step whose weights are kept."""
    summary, notes = entry.summary, []
    stopped = summary.get("stopped_early_at")
    if stopped is not None:
        notes.append(
            f"stopped early at step {stopped:,} of {entry.job.steps:,} as the dev loss did "
            f"not improve (patience {entry.job.patience:,})"
        )
    best = summary.get("best_step", metrics.best_step)
    if best is not None:
        where = "before tuning" if best == 0 else f"at step {best:,}"
        loss = metrics.dev.get(best, {}).get("loss")
        note = f"best dev loss {plots.number(loss)} {where}"
        if summary.get("kept") == "best":
            note += ", whose weights are kept"
        elif summary.get("kept") == "last":
            note += "; the last weights are kept"
        notes.append(note)
    return notes
