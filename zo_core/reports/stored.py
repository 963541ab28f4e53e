"""What every report takes from the run store: a model's newest runs, tables, where they come from.

A model is its name and revision, as everywhere in the run store: runs in another dtype or on
another device are runs of the same model.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from zo_core import runs
from zo_core.errors import UserError
from zo_core.export import Code, Section
from zo_core.jobs import command_line
from zo_core.runs import Run


def newest_done(kind: str, model: str, revision: str | None) -> Run | None:
    """The newest finished run of a kind on a model; damaged folders are passed over."""
    found = []
    for run in runs.list_runs((kind,)):
        try:
            job, status = run.job, run.status()
        except (OSError, ValueError, TypeError, KeyError):
            continue
        of = (getattr(job, "model", None), getattr(job, "revision", None))
        if status.state == "done" and of == (model, revision):
            found.append((status.created, run))
    # Ids order runs by the second only.
    return max(found, key=lambda pair: pair[0])[1] if found else None


def first_outlier_layer(model: str, revision: str | None) -> int | None:
    """What the emergence rule names in the newest finished scan of a model."""
    scan = newest_done("scan", model, revision)
    summary = (scan.result_json() or {}) if scan else {}
    return summary.get("first_outlier_layer", {}).get("emergence")


def read_tables(run: Run, names: Sequence[str]) -> dict[str, pd.DataFrame | None]:
    """Result tables by name; None for those that the run does not have.

    Raises:
        UserError: a table cannot be read.
    """
    tables: dict[str, pd.DataFrame | None] = {}
    for name in names:
        try:
            tables[name] = pd.read_parquet(run.result(f"{name}.parquet"))
        except FileNotFoundError:
            tables[name] = None
        except (OSError, ValueError) as error:
            raise UserError(
                f"run: table {name} of {run.run_id} cannot be read: {error}."
            ) from error
    return tables


def about_run(run: Run) -> str:
    """Which run it is and, if it did not finish, that it is only a part."""
    state = run.status().state
    cut = "" if state == "done" else f" It was {state}: this is what it had measured until then."
    return f"Run {run.run_id}.{cut}"


def origin(run: Run, measured: Sequence[str]) -> list[Section]:
    """Settings, versions and hardware of a run, and the command that makes it again.

    Args:
        run: the run.
        measured: fields of its summary that belong to the settings.
    """
    summary, facts = run.result_json() or {}, run.result_json("provenance.json") or {}
    job = run.job
    found = {name: summary[name] for name in measured if name in summary}
    return [
        Section(
            "Settings", [_facts(job.model_dump(mode="json")), _facts(_flat(found), "measured")]
        ),
        Section("Versions and hardware", [_facts(_flat(facts), "what")]),
        Section("Reproduce", [Code(command_line(job))]),
    ]


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Nested facts as ``outer.inner``; the job has a table of its own."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict) and name != "job":
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        elif name != "job":
            flat[name] = value
    return flat


def _facts(facts: dict[str, Any], what: str = "setting") -> pd.DataFrame:
    rows = [(name, str(value)) for name, value in facts.items() if value is not None]
    return pd.DataFrame(rows, columns=[what, "value"])
