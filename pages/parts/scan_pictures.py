"""Pictures of one scan, or of two side by side on one scale, linked by the selected layer."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from pages.parts.links import fine_tune
from pages.parts.scans import Scan
from pages.parts.words import layer_name, plain
from zo_core import plots
from zo_core.reports.parts import PARTS, named, unit

WINDOW, WINDOW_OF_TWO = 64, 32  # tokens shown at once: of one scan, of two side by side
CHANNELS, CHANNELS_OF_TWO = 64, 32
Firsts = Sequence[int | None]
"""The first outlier layer of each scan shown, by the chosen rule."""


def pictures(scans: Sequence[Scan], firsts: Firsts, selected: int) -> dict[str, go.Figure]:
    """Statistics, heatmaps and the detail of a layer.

    Args:
        scans: one, or two of which the first is the page's.
        firsts: the first outlier layer of each, marked.
        selected: the layer chosen by the reader, marked.

    Returns:
        The figures of the first scan, by title.
    """
    st.subheader("Statistics by layer", anchor=False)
    part = choose_part(scans)
    figures = profiles(scans, firsts, selected, part)
    figures |= by_channel(scans, firsts, selected, part)
    figures["Layer by token, block output"] = by_token(scans, firsts, selected)

    st.subheader("Layer detail", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", key="layer_detail"):
        layer = st.selectbox(
            "Layer",
            scans[0].layers,
            key="outlier_layer",
            width=260,
            format_func=lambda k: layer_name(k, len(scans[0].layers)),
        )
        fine_tune(layer, f"Fine-tune layer {layer}", "fine_tune_selected")
    detail(scans, layer, part)
    return figures


def choose_part(scans: Sequence[Scan]) -> str:
    """Which part of the block the statistics and the heatmap of channels are of."""
    there = [part for part in PARTS if all(part in scan.parts() for scan in scans)]
    part = there[0]
    if len(there) > 1:
        part = st.segmented_control(
            "Part of the block",
            there,
            format_func=PARTS.get,
            default=there[0],
            key="outlier_part",
            required=True,
        )
    return part


def profiles(
    scans: Sequence[Scan], firsts: Firsts, selected: int, part: str
) -> dict[str, go.Figure]:
    """Statistics by layer of one part; the figures of the first scan by title."""
    tables = [scan.part(part) for scan in scans]
    columns = [c for c in ("top1", "q10", "median") if all(c in t for t in tables)]
    scale = plots.log_range(*(t[c] for t in tables for c in columns))
    figures: dict[str, go.Figure] = {}

    def draw(index: int, scan: Scan) -> None:
        table = tables[index]
        shared = scale if len(scans) > 1 else None
        profile = plots.profile(table, firsts[index], selected, shared, unit(part))
        alt = "Top-1 to top-3, median and quantiles of magnitudes by layer"
        chart(profile, "profile_chart", alt, index)
        found = {f"Profile, {named(part)}": profile}
        if "kurtosis" in table:
            kurtosis = plots.kurtosis(table, firsts[index])
            chart(kurtosis, "kurtosis_chart", "Kurtosis by layer", index)
            found[f"Kurtosis, {named(part)}"] = kurtosis
        if index == 0:
            figures.update(found)

    side_by_side(scans, draw)
    return figures


def by_channel(
    scans: Sequence[Scan], firsts: Firsts, selected: int, part: str
) -> dict[str, go.Figure]:
    """Layer x channel of one part; the first scan's figure, if it has one, by its title."""
    title = f"Layer by {unit(part)}, {named(part)}"
    st.subheader(title, anchor=False)
    tables = [scan.tables.channels_of(part) for scan in scans]
    count = CHANNELS if len(scans) == 1 else CHANNELS_OF_TWO
    one_model = len({(s.entry.job.model, s.entry.job.revision) for s in scans}) == 1
    shared = plots.top_channels(pd.concat(tables), count)
    shown = [shared if one_model else plots.top_channels(table, count) for table in tables]
    scale = plots.log_range(
        *(
            table.loc[table["channel"].isin(columns), "magnitude"]
            for table, columns in zip(tables, shown, strict=True)
        )
    )
    figures: dict[str, go.Figure] = {}

    def draw(index: int, scan: Scan) -> None:
        if tables[index].empty:
            st.caption(no_channels(scan, part))
            return
        figure = plots.channel_heatmap(
            tables[index],
            firsts[index],
            selected,
            shown[index],
            scale,
            unit(part),
            int(scan.tables.layers["layer"].max()) + 1,
        )
        alt = f"Largest magnitude by layer and {unit(part)}, {named(part)}"
        chart(figure, "channel_chart", alt, index, links=True)
        if index == 0:
            figures[title] = figure

    side_by_side(scans, draw)
    if figures and part == "down_input":
        st.caption("Neurons of one number in two layers have nothing to do with each other.")
    return figures


def no_channels(scan: Scan, part: str) -> str:
    """Why a scan has no magnitudes by channel of a part."""
    channels = scan.tables.channels
    if channels is None or "part" not in channels:
        return f"This scan is of a version that kept no {unit(part)}s of this part: scan again."
    return f"No layer of this model has one set of {unit(part)}s here: they are those of experts."


def by_token(scans: Sequence[Scan], firsts: Firsts, selected: int) -> go.Figure:
    """Layer x token of one sequence of each scan, block output; the first scan's figure."""
    st.subheader("Layer by token, block output", anchor=False)
    if scans[0].covered:
        st.caption(f"The {scans[0].covered}: tokens of the others are not kept.")
    window = WINDOW if len(scans) == 1 else WINDOW_OF_TWO
    sequence, start = choose_sequence([s.tokens for s in scans], window)
    parts = [s.tokens[s.tokens["sequence"] == sequence] for s in scans]
    scale = plots.log_range(*(part["magnitude"] for part in parts))
    figures = []

    def draw(index: int, scan: Scan) -> None:
        if not (parts[index]["position"] >= start).any():
            st.caption("This scan has no tokens there.")
            return
        figure = plots.token_heatmap(
            scan.tokens, sequence, start, window, firsts[index], selected, scale
        )
        figures.append(figure)
        chart(figure, "token_chart", "Largest magnitude by layer and token", index, links=True)

    side_by_side(scans, draw)
    st.caption("Click a cell to see its layer below, or choose the layer there.")
    return figures[0]


def choose_sequence(tables: Sequence[pd.DataFrame], window: int) -> tuple[int, int]:
    """Which sequence, and from which position on; asked only when there is a choice."""
    tokens = tables[0]
    sequences = sorted(int(s) for s in tokens["sequence"].unique())
    with st.container(horizontal=True):
        sequence = sequences[0]
        if len(sequences) > 1:
            sequence = st.selectbox("Sequence", sequences, key="token_sequence", width=140)
        length = int(tokens.loc[tokens["sequence"] == sequence, "position"].max()) + 1
        start = 0
        if length > window:
            start = st.select_slider(
                "Positions",
                list(range(0, length, window)),
                key=f"token_start_{length}_{window}",
                width=260,
                format_func=lambda s: f"{s} to {min(s + window, length) - 1}",
            )
    return sequence, start


def detail(scans: Sequence[Scan], layer: int, part: str) -> None:
    """The largest magnitudes of one layer: of a part, and its channels; of tokens."""
    magnitude = {"magnitude": st.column_config.NumberColumn("magnitude", format="%.4g")}

    def draw(index: int, scan: Scan) -> None:
        if layer not in scan.layers:
            st.caption(f"This model has no layer {layer}.")
            return
        of_part = scan.part(part).set_index("layer")
        st.markdown(PARTS[part])
        if layer in of_part.index:
            metrics(of_part.loc[layer], unit(part))
        else:
            st.caption("This layer has no such part.")
        row = scan.tables.layers.set_index("layer").loc[layer]
        left, right = st.columns([3, 2])
        with left:
            st.markdown("Top tokens, block output")
            st.dataframe(
                top_tokens(layer, row, scan.tokens),
                hide_index=True,
                key=f"top_tokens_{index}",
                column_config=magnitude,
            )
            if scan.covered:
                st.caption(f"Top-1 to top-3 of the whole scan, the rest from the {scan.covered}.")
        with right:
            st.markdown(f"Top {unit(part)}s, {named(part)}")
            channels = scan.tables.channels_of(part)
            top = channels[channels["layer"] == layer].nlargest(10, "magnitude")
            st.dataframe(
                top[["channel", "magnitude"]].rename(columns={"channel": unit(part)}),
                hide_index=True,
                key=f"top_channels_{index}",
                column_config=magnitude,
            )

    side_by_side(scans, draw)


def metrics(row: pd.Series, unit: str) -> None:
    """Top-1 to 3 and the median of a layer; ``unit``: what a channel is called."""
    with st.container(horizontal=True):
        for r in (1, 2, 3):
            st.metric(
                f"top-{r}",
                plots.number(row[f"top{r}"]),
                border=True,
                width=210,
                delta=f"{plots.visible(row[f'top{r}_token'])[:14]} · "
                f"{unit} {row[f'top{r}_channel']:.0f}",
                delta_color="off",
                delta_arrow="off",
            )
        ratio = row["top1"] / row["median"] if row["median"] else math.nan
        st.metric(
            "median",
            plots.number(row["median"]),
            border=True,
            width=210,
            delta=f"top-1 is {plots.number(ratio)} x",
            delta_color="off",
            delta_arrow="off",
        )


def top_tokens(layer: int, row: pd.Series, tokens: pd.DataFrame) -> pd.DataFrame:
    """The ten largest tokens of a layer that are known: top-1 to 3 of the whole scan included."""
    columns = ["token", "magnitude", "sequence", "position", "channel"]
    best = [
        [row[f"top{r}" if c == "magnitude" else f"top{r}_{c}"] for c in columns]
        for r in (1, 2, 3)
        if pd.notna(row.get(f"top{r}_sequence"))
    ]
    table = pd.concat(
        [pd.DataFrame(best, columns=columns), tokens.loc[tokens["layer"] == layer, columns]]
        if best
        else [tokens.loc[tokens["layer"] == layer, columns]]
    )
    # The token table has one row a token; top-2 may be another channel of the same token.
    table = table.drop_duplicates(["sequence", "position", "channel"])
    table = table.nlargest(10, "magnitude")
    return table.assign(token=table["token"].map(plots.visible))


def side_by_side(scans: Sequence[Scan], draw: Callable[[int, Scan], None]) -> None:
    """Draw each scan in a column of its own; a single one over the whole width."""
    if len(scans) == 1:
        draw(0, scans[0])
        return
    # Columns stay side by side on a tablet, where figures are too narrow: stack them there.
    st.html('<style>.st-key-two_scans [data-testid="stColumn"] {min-width: 26rem}</style>')
    for index, (place, scan) in enumerate(zip(st.columns(len(scans)), scans, strict=True)):
        with place:
            st.caption(plain(f"{'AB'[index]}: {scan.title}"))
            draw(index, scan)


def chart(figure: go.Figure, name: str, alt: str, index: int, links: bool = False) -> None:
    """Draw a figure of the ``index``-th scan shown; ``links``: a click selects a layer."""
    key = name if index == 0 else f"{name}_other"
    if links:
        st.plotly_chart(
            figure, key=key, on_select=lambda: clicked(key), selection_mode="points", alt=alt
        )
    else:
        st.plotly_chart(figure, key=key, alt=alt)


def clicked(chart: str) -> None:
    """Select the layer of the clicked cell."""
    points = st.session_state[chart].selection.points
    if points:
        st.session_state["outlier_layer"] = int(points[0]["customdata"][0])
