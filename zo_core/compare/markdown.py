"""The tables of a comparison as Markdown, and the words that its reports share."""

from typing import Any


def markdown(facts: dict[str, Any]) -> str:
    """The tables as Markdown, with the command, versions and hardware."""
    where, spec = facts["provenance"], facts["spec"]
    lines = [
        f"# {spec['title'] or facts['comparison_id']}",
        "",
        "```",
        facts["command"],
        "```",
        "",
        f"Tasks {', '.join(spec['tasks'])}; seeds {', '.join(map(str, spec['seeds']))}; "
        f"{facts['budget']} forward passes a run; differences are to `{facts['baseline']}`, in "
        "points, with 95 % bootstrap intervals; p: exact sign flips, corrected by Holm.",
        "",
        "| task | arm | lr | n | mean | sd | difference | p | d_z |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(row) for row in facts["arms"]]
    notes = [f"* {r['arm']} ({r['task']}): {r['note']}" for r in facts["arms"] if r["note"]]
    notes += [f"* {sentence}" for sentence in search_notes(facts)]
    lines += ["", *notes] if notes else []
    if facts["claims"]:
        lines += ["", "## Verdict", ""]
        lines += [f"* {c['text']}: **{c['decision']}**{_rest(c)}" for c in facts["claims"]]
        lines += ["", facts["power"]] if facts["power"] else []
    if facts["precision"]:
        lines += ["", "## Precision", "", "| task | dtype | what | difference | p | |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_markdown_precision(row) for row in facts["precision"]]
    if facts["correlations"]:
        lines += ["", "## Rank correlations over layers", "", "| task | | rho | p | layers |"]
        lines += ["|---|---|---|---|---|"]
        lines += [_markdown_correlation(row) for row in facts["correlations"]]
    packages = ", ".join(f"{name} {v}" for name, v in where["packages"].items())
    device = where.get("device_name", "unknown device")
    lines += [
        "",
        f"Model {spec['common'].get('model', 'demo')} ({where.get('dtype', 'unknown dtype')}) on "
        f"{device}; Python {where['python']}, {packages}.",
        "",
    ]
    return "\n".join(lines)


def search_notes(facts: dict[str, Any]) -> list[str]:
    """What the search for learning rates cost, and where its answer is not the last word."""
    tried, spec = facts["search"], facts["spec"]
    if not tried:
        if facts["searches"]:
            return ["No search for a learning rate has ended yet."]
        return ["No learning rate was searched: each arm ran with one."]
    passes = sum(row["forward_passes"] for row in tried)
    notes = [
        f"Search: {len(tried)} runs of {facts['search_budget']} forward passes ({passes:,} in all, "
        f"beside {facts['budget']} of each final run), seed {spec['search_seed']}; "
        f"{sum(row['added'] for row in tried)} of them beyond a grid whose best rate was at its "
        f"edge (at most {spec['lr_extensions']} an arm and task)."
    ]
    edges = [f"`{r['arm']}` ({r['task']})" for r in facts["arms"] if r["lr_at_edge"]]
    if edges:
        notes.append(
            "The learning rate is at the edge of what was tried, so a better one may lie outside: "
            f"{', '.join(edges)}."
        )
    return notes


def _markdown_precision(row: dict[str, Any]) -> str:
    cells = [row["task"], row["dtype"], row["what"], _interval(row), _p(row["p_holm"])]
    return f"| {' | '.join([*cells, row['finding']])} |"


def _markdown_correlation(row: dict[str, Any]) -> str:
    rho = "" if row["rho"] is None else f"{row['rho']:+.2f}"
    pair = f"{row['a']} and {row['b']}"
    return f"| {' | '.join([row['task'], pair, rho, _p(row['p']), str(row['n'])])} |"


def _interval(row: dict[str, Any]) -> str:
    """A difference in points with its interval."""
    difference = _points(row["difference"], sign=True)
    if row["low"] is not None:
        low, high = _points(row["low"], sign=True), _points(row["high"], sign=True)
        difference += f" [{low}, {high}]"
    return difference


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _rest(claim: dict[str, Any]) -> str:
    return claim["sentence"].removeprefix(claim["decision"])


def _markdown_row(row: dict[str, Any]) -> str:
    cells = [
        row["task"],
        row["arm"].replace("|", "\\|"),
        "" if row["lr"] is None else f"{row['lr']:g}",
        str(row["n"]) + (f" ({row['missing']} missing)" if row["missing"] else ""),
        _points(row["mean"]),
        _points(row["sd"]),
        _interval(row),
        _p(row["p_holm"]),
        "" if row["effect"] is None else f"{row['effect']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _points(value: float | None, sign: bool = False) -> str:
    """A share in points (hundredths)."""
    if value is None:
        return ""
    return f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
