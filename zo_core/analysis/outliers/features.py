"""LLM.int8(): features that are large in many layers and at many positions."""

from zo_core.analysis.outliers.rule import RuleSpec, ScanTables, Verdict, found, none

MAGNITUDE = 6
"""Counted by the scan, so it cannot be moved afterwards."""


def _int8(tables: ScanTables, layers: float, positions: float) -> Verdict:
    channels = tables.channels_of("block_output")
    channels = channels[channels["layer"] >= 0]
    channels = channels.assign(reaches=channels["magnitude"] >= MAGNITUDE)
    n_layers, n_channels = channels["layer"].nunique(), channels["channel"].nunique()
    table = tables.layers[tables.layers["layer"] >= 0].set_index("layer")
    tokens = (table["count"] + table["nonfinite"]) / n_channels
    counts = channels.groupby("channel")
    seen = counts["reaches"].sum() / n_layers
    share = counts["tokens6"].sum() / tokens.sum()
    hit = (seen >= layers) & (share >= positions)
    best = int(share.where(hit, -1.0 if hit.any() else share).idxmax())
    numbers = {
        "features": float(hit.sum()),
        "layers_share": float(seen[best]),
        "positions_share": float(share[best]),
    }
    where = (
        f"channel {best} reaches {MAGNITUDE} in {seen[best]:.0%} of layers and at "
        f"{share[best]:.1%} of positions"
    )
    if not hit.any():
        return none(
            f"{where}, the largest share of positions; the rule asks for {layers:.0%} of layers "
            f"and {positions:.0%} of positions.",
            **numbers,
        )
    affected = channels[channels["channel"].isin(hit.index[hit])]
    in_layer = affected["tokens6"] / affected["layer"].map(tokens)
    layer = int(affected.loc[in_layer >= positions, "layer"].min())
    return found(
        layer,
        f"{int(hit.sum())} of {n_channels} channels are outlier features; {where}. Layer {layer} "
        f"is the first where such a feature reaches {MAGNITUDE} at {positions:.0%} of positions.",
        **numbers,
    )


INT8 = RuleSpec(
    "int8",
    "LLM.int8()",
    "feature",
    f"A feature is an outlier if one channel of the block output has a magnitude of at least "
    f"{MAGNITUDE} in at least a share `layers` of layers, and at at least a share `positions` of "
    "all positions of all layers. Named is the first layer where an outlier feature reaches that "
    "magnitude at a share `positions` of its positions.",
    "Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); its tensor is the input of the "
    "projections, here the block output",
    {"layers": 0.25, "positions": 0.06},
    _int8,
    needs="channels",
)
