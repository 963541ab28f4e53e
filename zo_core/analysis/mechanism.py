"""Who writes a massive activation into the residual stream, which neurons, and who removes it.

A *massive channel* is traced at its *site*: the token of the texts where its magnitude is largest,
over all layers. There the residual stream is followed through every block, split into what the
attention and what the MLP added: a block is run a second time on the same input with its
down-projection's output (of a mixture of experts: the MLP's) set to zero, and

    attention = block without MLP - block input,    MLP = block - block without MLP.

So the parts add up to the change of the stream, to the rounding of its dtype, in any family: with
parallel attention, norms after the parts (Gemma, OLMo-2) or scaled residuals, too. Where a norm is
applied to the sum of stream and part (post-LN, OPT-350m), "attention" and "MLP" include what it
does.

* The **writer** is the part with the largest contribution towards the peak value, up to the layer
  of the peak.
* The **remover** is the part with the largest contribution against it in a later layer, if that is
  at least half of the peak. Otherwise the activation stays, or fades gradually.
* **Neurons**: the MLP writes ``sum_i W[c, i] a_i`` (and a bias) to channel c, with a the input of
  the down-projection and W its weight. ``share`` is ``W[c, i] a_i`` over that sum. Of a mixture of
  experts, neuron i of expert e is number ``e width + i``, its product is weighted by the router,
  and ``share`` is over all that the MLP wrote, a shared expert included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zo_core.analysis.recording import Recording
from zo_core.errors import UserError
from zo_core.models.decoder import hidden_of
from zo_core.models.parts import Experts, find_parts

PROMINENT = 0.25
"""A further channel is traced if its peak is at least this share of the largest."""
MASSIVE_TOKEN = 0.5
"""A token carries a massive activation if it has at least this share of its channel's peak."""
REMOVES = 0.5
NEURONS = 20
"""Neurons kept for each writer and remover, by magnitude of what they write."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a massive channel peaks."""

    layer: int
    sequence: int
    position: int
    channel: int
    value: float
    """Of the block output, signed."""


def find_sites(recording: Recording, channels: int) -> list[Site]:
    """The massive channels' sites, largest magnitude first; always at least one.

    Args:
        recording: the texts.
        channels: at most so many.

    Raises:
        UserError: no activation is finite.
    """
    best: torch.Tensor | None = None  # [C]
    where: list[tuple[int, int, int]] = []  # of every channel: layer, sequence, position
    for batch in recording.batches:
        for layer, output in enumerate(batch.outputs):
            magnitude = output.float().abs().nan_to_num(0.0, 0.0, 0.0)
            magnitude = magnitude.masked_fill(~batch.real[..., None], 0.0).flatten(0, 1)
            values, flat = magnitude.max(0)
            if best is None:
                best = torch.zeros_like(values)
                where = [(0, 0, 0)] * len(values)
            better = (values > best).nonzero()[:, 0].tolist()
            best = torch.maximum(best, values)
            rows, width = flat.tolist(), output.shape[1]
            for c in better:
                where[c] = (layer, batch.first + rows[c] // width, rows[c] % width)
    assert best is not None
    if not float(best.max()):
        raise UserError("model: no activation is finite: use bfloat16 or float32.")
    values, order = best.topk(min(channels, len(best)))
    sites = []
    for magnitude, c in zip(values.tolist(), order.tolist(), strict=True):
        if magnitude < PROMINENT * float(best.max()):
            break
        layer, sequence, position = where[c]
        value = float(_output(recording, layer, sequence)[position, c])
        sites.append(Site(layer, sequence, position, c, value))
    return sites


def _output(recording: Recording, layer: int, sequence: int) -> torch.Tensor:
    """Block output [T, C] of a sequence."""
    for batch in recording.batches:
        if batch.first <= sequence < batch.first + len(batch.ids):
            return batch.outputs[layer][sequence - batch.first]
    raise AssertionError(f"no sequence {sequence}")


def massive_tokens(recording: Recording, site: Site) -> list[torch.Tensor]:
    """Which tokens carry the channel's massive activation: bool [B, T] for every batch."""
    least = MASSIVE_TOKEN * abs(site.value)
    return [
        (batch.outputs[site.layer][..., site.channel].float().abs() >= least) & batch.real
        for batch in recording.batches
    ]


@dataclass(frozen=True, slots=True)
class _Written:
    """What the input neurons of a block's down-projections write to a site; float32 [I] each."""

    activation: torch.Tensor
    weight: torch.Tensor
    product: torch.Tensor
    total: float
    """All that was written, before any norm that follows."""
    neuron: torch.Tensor
    """int64 [I]: their numbers."""


@dataclass(slots=True)
class _Seen:
    """What a block showed of one site."""

    before: float
    attention: float
    mlp: float
    after: float
    written: _Written | None
    """None where the down-projection cannot be read."""


class _BlockTrace:
    """Hooks on one block that split what it adds to the residual stream at the sites' tokens."""

    def __init__(self, block: nn.Module, places: Sequence[tuple[int, int, int]]) -> None:
        self._block, self._places = block, places
        self._parts = find_parts(block)
        self._down: tuple[nn.Module, torch.Tensor] | None = None
        self._routed: list[torch.Tensor] = []
        self._again = False
        self._width = 0
        self.seen: list[_Seen] = []

    def attach(self) -> list[Any]:
        parts = self._parts
        linears = parts.mlp_linears if parts.experts is None and parts.readable else ()
        handles: list[Any] = [m.register_forward_hook(self._linear) for m in linears]
        if self._parts.experts is not None:
            experts = self._parts.experts.module
            handles.append(experts.register_forward_pre_hook(self._route, with_kwargs=True))
        handles.append(self._block.register_forward_pre_hook(self._enter, with_kwargs=True))
        handles.append(self._block.register_forward_hook(self._leave, with_kwargs=True))
        return handles

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._width = (args[0] if args else kwargs["hidden_states"]).shape[-1]

    def _linear(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not self._again and output.shape[-1] == self._width:
            self._down = (module, args[0])

    def _route(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._again:  # hidden states [N, C], chosen experts [N, K], their weights [N, K]
            self._routed = [*args, *kwargs.values()][:3]

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = hidden_of(output)
        last = self._down[0] if self._down is not None else self._parts.mlp
        if last is None:
            raise UserError(
                f"model: no MLP was found in {type(module).__name__}: its massive activations "
                "cannot be traced."
            )
        self._again = True
        handle = last.register_forward_hook(_nothing)
        try:
            without = hidden_of(module.forward(*args, **kwargs))
        finally:
            handle.remove()
            self._again = False
        for row, position, channel in self._places:
            b, w, a = (float(h[row, position, channel]) for h in (before, without, after))
            written, at = None, row * after.shape[1] + position
            if self._down is not None:
                down, states = self._down
                written = _dense(down, states.reshape(-1, states.shape[-1])[at], channel)
            elif self._routed and self._parts.experts is not None:
                hidden, chosen, share = (t.reshape(-1, t.shape[-1])[at] for t in self._routed)
                written = _of_experts(self._parts.experts, hidden, chosen, share, channel, a - w)
            self.seen.append(_Seen(b, w - b, a - w, a, written))


def _dense(down: nn.Module, inputs: torch.Tensor, channel: int) -> _Written:
    """What each entry [I] of a down-projection's input writes to a channel."""
    matrix, bias = down.weight, down.bias
    assert isinstance(matrix, torch.Tensor)
    weight = (matrix[:, channel] if isinstance(down, Conv1D) else matrix[channel]).float()
    activation = inputs.float()
    product = weight * activation
    total = float(product.sum()) + (0.0 if bias is None else float(bias[channel]))  # type: ignore[index]
    return _Written(
        activation, weight, product, total, torch.arange(len(product), device=product.device)
    )


def _of_experts(
    experts: Experts,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    share: torch.Tensor,
    channel: int,
    total: float,
) -> _Written | None:
    """The same of the experts that a token [C] was sent to; None for experts of another make."""
    module: Any = experts.module
    plain = module.has_gate and module.is_concatenated
    if not plain or module.is_transposed or module.has_bias or module.has_post_expert_norm:
        return None
    activations, weights, products, neurons = [], [], [], []
    for expert, factor in zip(chosen.tolist(), share.tolist(), strict=True):
        activation = module._apply_gate(module.gate_up_proj[expert] @ hidden).float()
        weight = module.down_proj[expert][channel].float()
        activations.append(activation)
        weights.append(weight)
        products.append(activation * weight * factor)
        first = expert * experts.width
        neurons.append(torch.arange(first, first + experts.width, device=weight.device))
    activation, weight, product, neuron = map(torch.cat, (activations, weights, products, neurons))
    return _Written(activation, weight, product, total, neuron)


def _nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, tuple | list):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@dataclass(slots=True)
class Traced:
    """Tables about the sites; ``site`` counts them from 0."""

    sites: pd.DataFrame
    """``site, sequence, position, token, channel, layer, value, writer_layer, writer, written,
    remover_layer, remover, removed, final``: the peak, contributions, and the last block output."""
    contributions: pd.DataFrame
    """``site, layer, before, attention, mlp, after``: the residual stream at the site."""
    neurons: pd.DataFrame
    """``site, role, layer, row, neuron, activation, weight, product, share``."""


@torch.no_grad()
def trace(recording: Recording, sites: Sequence[Site]) -> Traced:
    """Follow the residual stream at every site, and look into the parts that move it most.

    Raises:
        UserError: a block has no MLP that can be found.
    """
    loaded = recording.loaded
    numbers = sorted({s.sequence for s in sites})
    part = [recording.sequences[n] for n in numbers]
    width = max(map(len, part))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in part], device=loaded.device)
    places = [(numbers.index(s.sequence), s.position, s.channel) for s in sites]
    traces = [_BlockTrace(block, places) for block in loaded.decoder.blocks]
    handles = [handle for t in traces for handle in t.attach()]
    try:
        loaded.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    rows, contributions, neurons = [], [], []
    for number, site in enumerate(sites):
        seen = [t.seen[number] for t in traces]
        contributions += [
            (number, layer, s.before, s.attention, s.mlp, s.after) for layer, s in enumerate(seen)
        ]
        rows.append(_who(recording, number, site, seen))
        for role in ("writer", "remover"):
            layer, name = rows[-1][f"{role}_layer"], rows[-1][role]
            if name == "mlp":
                neurons += _neurons(number, role, layer, site.channel, seen[layer])
    columns = ["site", "layer", "before", "attention", "mlp", "after"]
    table = pd.DataFrame(rows).astype({"writer_layer": "Int64", "remover_layer": "Int64"})
    return Traced(
        table,
        pd.DataFrame(contributions, columns=columns),
        pd.DataFrame(
            neurons,
            columns=[
                "site",
                "role",
                "layer",
                "row",
                "neuron",
                "activation",
                "weight",
                "product",
                "share",
            ],
        ),
    )


def _who(recording: Recording, number: int, site: Site, seen: list[_Seen]) -> dict[str, Any]:
    sign = 1.0 if site.value > 0 else -1.0
    parts = [
        (getattr(s, name), layer, name)
        for layer, s in enumerate(seen)
        for name in ("attention", "mlp")
    ]
    written, writer_layer, writer = max(
        (p for p in parts if p[1] <= site.layer), key=lambda p: sign * p[0]
    )
    later = [p for p in parts if p[1] > writer_layer and -sign * p[0] >= REMOVES * abs(site.value)]
    removed, remover_layer, remover = max(
        later, key=lambda p: -sign * p[0], default=(None, None, None)
    )
    return {
        "site": number,
        "sequence": site.sequence,
        "position": site.position,
        "token": recording.token(site.sequence, site.position),
        "channel": site.channel,
        "layer": site.layer,
        "value": site.value,
        "writer_layer": writer_layer,
        "writer": writer,
        "written": written,
        "remover_layer": remover_layer,
        "remover": remover,
        "removed": removed,
        "final": seen[-1].after,
    }


def _neurons(
    site: int, role: str, layer: int, channel: int, seen: _Seen
) -> list[tuple[int, str, int, int, int, float, float, float, float]]:
    """The input neurons that write most to a channel; none where there is no one projection."""
    written = seen.written
    if written is None:
        return []
    order = written.product.abs().topk(min(NEURONS, len(written.product))).indices.tolist()
    return [
        (
            site,
            role,
            layer,
            channel,
            int(written.neuron[i]),
            float(written.activation[i]),
            float(written.weight[i]),
            float(written.product[i]),
            float(written.product[i]) / written.total if written.total else 0.0,
        )
        for i in order
    ]
