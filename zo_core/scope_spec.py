"""The names of scopes: what a job's ``scope`` field may say, and what it means. No torch here.

``<k>`` is a 0-based layer, or ``auto`` for the layer that the job's outlier rule names (the
dominant layer). Which tensors a scope stands for is decided in :mod:`zo_core.zo.scopes`.
"""

import re
from dataclasses import dataclass, replace

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ScopeForm:
    """One form a scope can be written in."""

    name: str
    syntax: str
    pattern: re.Pattern[str]
    example: str
    meaning: str


@dataclass(frozen=True, slots=True)
class ScopeSpec:
    """A scope's name, taken apart."""

    form: str
    layers: tuple[int | str, ...] = ()
    """Named layers: 0-based indices or ``auto``."""
    percent: float | None = None
    rest: bool = False
    """Of ``channels``: the complement is meant."""
    seed: int | None = None

    @property
    def needs_rule(self) -> bool:
        """Whether the dominant layer must be known to say what is tuned."""
        return AUTO in self.layers or self.form == "random-layer"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that are given by number."""
        return tuple(k for k in self.layers if isinstance(k, int))

    def resolve(self, dominant: int | None) -> "ScopeSpec":
        """The same scope with ``auto`` replaced by the dominant layer, each layer once."""
        named = (dominant if k == AUTO else k for k in self.layers)
        return replace(self, layers=tuple(sorted({k for k in named if isinstance(k, int)})))


_K = r"(?P<layer>auto|\d{1,5})"
_P = r"(?P<percent>\d{1,3}(?:\.\d{1,6})?)"


def _form(name: str, syntax: str, pattern: str, example: str, meaning: str) -> ScopeForm:
    return ScopeForm(name, syntax, re.compile(pattern), example, meaning)


FORMS = {
    form.name: form
    for form in (
        _form("full", "full", r"full", "full", "every parameter, embeddings included"),
        _form("layer", "layer:<k>", rf"layer:{_K}", "layer:3", "one decoder layer"),
        _form(
            "layers",
            "layers:<list>",
            r"layers:(?P<layers>(?:auto|\d{1,5})(?:,(?:auto|\d{1,5}))*)",
            "layers:1,30",
            "several decoder layers",
        ),
        _form(
            "attention",
            "attention:<k>",
            rf"attention:{_K}",
            "attention:auto",
            "the attention of a layer, without norms",
        ),
        _form("mlp", "mlp:<k>", rf"mlp:{_K}", "mlp:auto", "the MLP of a layer, without norms"),
        _form(
            "channels",
            "channels:<k>:top<p>% or rest<p>%",
            rf"channels:{_K}:(?P<part>top|rest){_P}%",
            "channels:auto:top1%",
            "the p % outlier MLP channels of a layer; rest: all of the layer but them",
        ),
        _form(
            "all-but",
            "all-but:<k>",
            rf"all-but:{_K}",
            "all-but:auto",
            "every parameter but those of one layer",
        ),
        _form(
            "random-layer",
            "random-layer:<seed>",
            r"random-layer:(?P<seed>\d{1,9})",
            "random-layer:0",
            "one layer drawn from all but the one that the rule names",
        ),
        _form(
            "lora",
            "lora or lora:<k>",
            rf"lora(?::{_K})?",
            "lora:auto",
            "LoRA adapters (r 8, alpha 16) of q and v: in all layers, or one",
        ),
        _form(
            "sparse",
            "sparse:<p>",
            rf"sparse:{_P}%?",
            "sparse:25",
            "the p % smallest weights of every matrix, chosen once",
        ),
        _form("prefix", "prefix", r"prefix", "prefix", "5 virtual keys and values in every layer"),
    )
}
SYNTAX = ", ".join(form.syntax for form in FORMS.values())


def parse(text: str) -> ScopeSpec:
    """Take a scope's name apart.

    Raises:
        ValueError: it has none of the forms, or a percentage outside (0, 100).
    """
    for form in FORMS.values():
        match = form.pattern.fullmatch(text)
        if match is None:
            continue
        parts = match.groupdict()
        listed = parts.get("layers") or parts.get("layer")
        percent = float(parts["percent"]) if parts.get("percent") else None
        if percent is not None and not 0 < percent < 100:
            raise ValueError(f"{text!r} is not valid: give a percentage above 0 and below 100")
        return ScopeSpec(
            form=form.name,
            layers=tuple(k if k == AUTO else int(k) for k in listed.split(",")) if listed else (),
            percent=percent,
            rest=parts.get("part") == "rest",
            seed=int(parts["seed"]) if parts.get("seed") else None,
        )
    raise ValueError(
        f"{text!r} is unknown: choose {SYNTAX}, where <k> is auto or a 0-based layer, as layer:3"
    )


def spell(text: str, dominant: int | None) -> str:
    """A scope's name with ``auto`` replaced by the dominant layer, once that is known."""
    return text if dominant is None else re.sub(r"\bauto\b", str(dominant), text)
