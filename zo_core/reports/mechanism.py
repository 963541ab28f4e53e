"""The report of a mechanism run: who writes a massive activation, who removes it, what it does."""

from typing import Any

import pandas as pd

from zo_core import plots
from zo_core.errors import UserError
from zo_core.export import Section
from zo_core.reports.stored import about_run, origin, read_tables
from zo_core.runs import Run

PARTS = {"mlp": "MLP", "attention": "attention"}
SETTING = (
    "At one layer's output, at every massive token, the massive channels are set to zero, or to "
    "their mean there (Sun et al. 2024); control: as many ordinary channels set to zero. Change of "
    "the mean next-token cross entropy"
)
MEASURED = ("n_sequences", "n_tokens", "dtype", "massive_tokens", "loss", "seconds")


def mechanism_sections(run: Run) -> list[Section]:
    """Everything that a mechanism run found; the first paragraph is who writes it.

    Raises:
        UserError: it has not ended, or has no tables that can be read.
    """
    if run.status().live:
        raise UserError(f"run: {run.run_id} is {run.status().state}: wait until it has ended.")
    found = read_tables(run, ("sites", "contributions", "neurons", "sinks", "interventions"))
    sites, contributions, neurons = (found[n] for n in ("sites", "contributions", "neurons"))
    if sites is None or contributions is None or neurons is None:
        raise UserError(f"run: {run.run_id} ended before its first table: run it again.")
    summary = run.result_json() or {}
    first = summary.get("first_outlier_layer")
    return [
        Section("", [*_told(sites, summary), f"{about_run(run)} Layers and heads are 0-based."]),
        Section("Massive channels", [sites]),
        *(
            _channel(
                site,
                contributions[contributions["site"] == site["site"]],
                neurons[neurons["site"] == site["site"]],
                summary,
            )
            for _, site in sites.iterrows()
        ),
        *_sinks(found["sinks"], first, summary),
        *_interventions(found["interventions"], first, summary),
        *origin(run, MEASURED),
    ]


def story(site: pd.Series) -> str:
    """What happens to the massive activation of a site (a row of ``sites``), in one paragraph."""
    writer, layer = PARTS[site["writer"]], int(site["writer_layer"])
    share = site["written"] / site["value"]
    said = (
        f"Channel {site['channel']} peaks at {plots.number(site['value'])} after layer "
        f"{site['layer']}, at token {plots.visible(site['token'])} (sequence {site['sequence']}, "
        f"position {site['position']}). The {writer} of layer {layer} adds "
        f"{plots.number(site['written'])} of it ({share:.0%}). "
    )
    if pd.isna(site["remover_layer"]):
        return (
            said + f"No part removes it: the last block still holds {plots.number(site['final'])}."
        )
    remover, by = PARTS[site["remover"]], int(site["remover_layer"])
    return said + (
        f"The {remover} of layer {by} takes {plots.number(-site['removed'])} away again; "
        f"the last block leaves {plots.number(site['final'])}."
    )


def not_massive(summary: dict[str, Any]) -> str:
    """That by the rule there is no massive activation at all; empty if there is one."""
    if not summary or summary.get("first_outlier_layer") is not None:
        return ""
    return (
        f"By the rule {summary['rule']} this model has no massive activation on these texts: what "
        f"follows is about its largest activation all the same. {summary.get('reason', '')}"
    )


def about_sinks(sinks: pd.DataFrame) -> str:
    """What the figure of attention sinks shows."""
    return (
        "Share of a head's attention that goes to the tokens with a massive activation, mean over "
        "all later queries. Evenly spread attention would give "
        f"{sinks['uniform'].iloc[0]:.1%}."
    )


def about_interventions(summary: dict[str, Any]) -> str:
    """What the figure of interventions shows."""
    base = summary.get("loss")
    return SETTING + (f" from {base:.4g} nats." if base is not None else ".")


def _told(sites: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    site, caveat = sites.iloc[0], not_massive(summary)
    what = "largest" if caveat else "massive"
    head = f"The {PARTS[site['writer']]} of layer {int(site['writer_layer'])} writes the {what} "
    return [f"{head}activation.", *([caveat] if caveat else [])]


def _channel(
    site: pd.Series, contributions: pd.DataFrame, neurons: pd.DataFrame, summary: dict[str, Any]
) -> Section:
    items: list[Any] = [story(site), plots.contributions(contributions)]
    for role, rows in neurons.groupby("role", sort=False):
        items += [f"Neurons of the {role}, layer {rows['layer'].iloc[0]}", plots.neurons(rows)]
    if neurons.empty:
        items.append(f"Neurons: {summary.get('neurons') or 'no MLP wrote or removed it'}.")
    return Section(f"Residual stream in channel {site['channel']}", items)


def _sinks(table: pd.DataFrame | None, first: int | None, summary: dict[str, Any]) -> list[Section]:
    if table is None:
        return []
    if table.empty:
        reason = summary.get("sinks") or "no attention weights were found"
        return [Section("What attends to it", [f"No attention sinks: {reason}."])]
    return [Section("What attends to it", [plots.sinks(table, first), about_sinks(table)])]


def _interventions(
    table: pd.DataFrame | None, first: int | None, summary: dict[str, Any]
) -> list[Section]:
    if table is None:
        return []
    items = [plots.interventions(table, first), about_interventions(summary)]
    return [Section("What it is for", items)]
