"""The table of the step benchmark."""

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what it was measured on."""
    facts = result["provenance"]
    lines = [
        f"`{result['shape']}`, layer {result['layer']}, batch {result['batch']}, "
        f"{facts['dtype']}, {facts['device_name']}, torch {facts['packages']['torch']}, "
        f"transformers {facts['packages']['transformers']}, {facts['written'][:10]}",
        "",
        "| task | tokens / padded | MeZO ms | naive layer ms (ratio) | ours ms (ratio) | "
        "GEMM floor ms (ours / floor) | utilisation | peak GiB: MeZO, ours (expected) | "
        "ours, fp8 suffix: ms (ratio), peak GiB | error of g: own, fp8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for t in result["tasks"]:
        mezo, naive, ours = t["mezo"], t["naive"], t["ours"]
        share = f"{100 * t['utilisation']:.0f} %" if t["utilisation"] else ""
        memory = ", ".join(
            f"{a['peak_bytes'] / 2**30:.1f}" for a in (mezo, ours) if a["peak_bytes"]
        )
        if ours["expected_bytes"]:
            memory += f" ({ours['expected_bytes'] / 2**30:.1f})"
        lines.append(
            f"| {t['task']} | {t['tokens']:.0f} / {t['padded']:.0f} | {_spread(mezo)} | "
            f"{_spread(naive)} ({t['speedup_naive']:.1f}x) | **{_spread(ours)}** "
            f"(**{t['speedup']:.1f}x**) | {t['floor']:.1f} "
            f"({t['over_floor']:.2f}) | {share} | {memory} | {_fp8_cells(t)} |"
        )
    lines += ["", "Phases of a step in milliseconds, measured apart:", ""]
    for t in result["tasks"]:
        for arm in ("mezo", "naive", "ours", "fp8"):
            if not t[arm]:
                continue
            parts = ", ".join(f"{name} {value:.2f}" for name, value in t[arm]["phases"].items())
            lines.append(f"* {t['task']}, {arm}: {parts}")
    sources = "; ".join(f"{t['task']}: {t['rows']}" for t in result["tasks"])
    lines += ["", f"Rows: {sources}. Our path: {result['tasks'][0]['path']}."]
    if result["short"]:
        lines[-1] += f" Memory was too short for {', '.join(result['short'])}."
    return "\n".join(lines) + "\n"


def _fp8_cells(task: dict[str, Any]) -> str:
    arm, error = task["fp8"], task["fp8_error"]
    if not arm:
        return "not here |"
    return (
        f"{_spread(arm)} (**{task['speedup_fp8']:.1f}x**), {arm['peak_bytes'] / 2**30:.1f} | "
        f"{error[0]:.0%}, {error[1]:.0%}"
    )


def _spread(arm: dict[str, Any]) -> str:
    return f"{arm['median']:.1f} [{arm['low']:.1f}, {arm['high']:.1f}]"
