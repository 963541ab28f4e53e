"""Comparisons by name."""

from collections.abc import Callable
from typing import Any

from zo_core.compare.spec import ZERO_SHOT
from zo_core.models.catalog import describe

PAPER_TASKS = ["sst2", "rte", "cb", "boolq", "wsc", "copa", "multirc", "squad", "drop"]
PAPER_LRS = [1e-7, 5e-7, 1e-6, 5e-6]
"""The paper's grid, for models other than the bundled one."""
Fields = dict[str, Any]


def _arm(name: str, scope: str = "", **fields: Any) -> Fields:
    return {"name": name, "scope": scope or name, **fields}


def _other_layer(model: str, revision: str | None) -> int:
    """The last layer but one: what the paper adds to the dominant layer (30 of 32)."""
    return max(0, describe(model, revision).n_layers - 2)


def quick(model: str, revision: str | None) -> Fields:
    """Zero-shot, full, the dominant layer and two random ones: minutes on a CPU.

    Six seeds are the fewest that can decide its two claims.
    """
    return {
        "title": "quick: the dominant layer, the full model and two random layers",
        "arms": [
            _arm(ZERO_SHOT),
            _arm("full"),
            _arm("dominant", "layer:auto"),
            _arm("random-1", "random-layer:1"),
            _arm("random-2", "random-layer:2"),
        ],
        "seeds": [0, 1, 2, 3, 4, 5],
        "steps": 40,
        "lr_factors": [1],
        "evaluations": 1,
        "batch_size": 8,
        "eval_examples": 100,
        "dev_examples": 50,
    }


def paper(model: str, revision: str | None) -> Fields:
    """The arms of the paper's tables that exist here."""
    grid: Fields = {} if model == "demo" else {"lr": PAPER_LRS}
    inside = [
        _arm("dominant-mlp", "mlp:auto", **grid),
        _arm("dominant-top1%", "channels:auto:top1%", **grid),
        _arm("dominant-rest1%", "channels:auto:rest1%", **grid),
    ]
    return {
        "title": "paper: the arms of the paper's tables",
        "arms": [
            _arm(ZERO_SHOT),
            _arm("adamw-full", "full", optimizer="adamw"),
            _arm("full", **grid),
            _arm("lora"),
            _arm("sparse", "sparse:25", **grid),
            _arm("dominant", "layer:auto", **grid),
            _arm("dominant-lora", "lora:auto"),
            *inside,
            _arm("two-layers", f"layers:auto,{_other_layer(model, revision)}", **grid),
            _arm("random-1", "random-layer:1", **grid),
            _arm("random-2", "random-layer:2", **grid),
        ],
        "tasks": PAPER_TASKS,
        "seeds": [0, 1, 2, 3, 4],
        "steps": 10_000,
        "search_steps": 2_000,
    }


def falsify(model: str, revision: str | None) -> Fields:
    """What would refute the claim: other layers alone, and the full model without this one.

    And whether arithmetic in place, as published code does it, changes the picture.
    """
    return {
        "title": "falsify: every single layer, and the full model without the dominant one",
        "arms": [
            _arm(ZERO_SHOT),
            _arm("full"),
            _arm("all-but", "all-but:auto"),
            _arm("shuffled-rule", "random-layer:{seed}"),
            *_single_layers(model, revision),
            *_in_place("float16"),
            *_in_place("bfloat16"),
        ],
        "seeds": [0, 1, 2, 3, 4],
        "steps": 500,
    }


def layers(model: str, revision: str | None) -> Fields:
    """Every single layer and the full model."""
    return {
        "title": "layers: the gain of every layer",
        "arms": [_arm(ZERO_SHOT), _arm("full"), *_single_layers(model, revision)],
        "seeds": [0, 1, 2],
        "steps": 500,
    }


def scopes(model: str, revision: str | None) -> Fields:
    """Every form of scope at equal forward passes, and AdamW."""
    forms = ["full", "layer:auto", f"layers:auto,{_other_layer(model, revision)}"]
    forms += ["attention:auto", "mlp:auto", "channels:auto:top1%", "channels:auto:rest1%"]
    forms += ["all-but:auto", "random-layer:1", "random-layer:2", "lora", "lora:auto"]
    forms += ["sparse:25%", "prefix"]
    return {
        "title": "scopes: every form of scope at equal forward passes",
        "arms": [
            _arm(ZERO_SHOT),
            *(_arm(form) for form in forms),
            _arm("adamw layer:auto", "layer:auto", optimizer="adamw"),
            _arm("adamw full", "full", optimizer="adamw"),
        ],
        "seeds": [0, 1, 2],
        "steps": 500,
    }


def _single_layers(model: str, revision: str | None) -> list[Fields]:
    return [_arm(f"layer:{k}") for k in range(describe(model, revision).n_layers)]


def _in_place(dtype: str) -> list[Fields]:
    short = dtype.replace("float", "fp").replace("bfp", "bf")
    common: Fields = {"precision": "inplace", "dtype": dtype}
    return [
        _arm(f"full in-place {short}", "full", **common),
        _arm(f"dominant in-place {short}", "layer:auto", **common),
    ]


PRESETS: dict[str, Callable[[str, str | None], Fields]] = {
    "quick": quick,
    "paper": paper,
    "falsify": falsify,
    "layers": layers,
    "scopes": scopes,
}
