"""A suffix at the rate of fp8: the mean of a pair of points and half its difference, each rounded.

Above the tuned layer, the tokens of ``theta + eps z`` and ``theta - eps z`` are x+ and x-, nearly
the same numbers. Rounded to fp8 apart, their difference drowns: a rounding of 3 % of x against a
difference of 0.1 % of x. A linear layer is linear, though::

    m = (x+ + x-) / 2,   d = (x+ - x-) / 2,   W x+ = W m + W d,   W x- = W m - W d

so m and d go through the product in place of x+ and x-, with a scale for each token. Rounding d
costs 3 % of the difference, however small that is beside x; rounding m moves both losses alike, and
g = (L+ - L-) / (2 eps) feels it only as much as the loss's own slope does.

The same holds for every other rounding between the points, and those of bfloat16 are as large as
the difference itself. So here the residual stream, norms and logits are float32, which costs little
where they are fused with their neighbours; attention stays in the model's dtype. On the bundled
model g is nearer to float32's than in plain bfloat16 (``zo_core/bench/fp8.py``). The method is
ours; scaling by token and by output row is the common one of fp8 inference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINY = 1e-12
"""Smallest magnitude of a row that its scale follows."""

MULTIPLE = 16
"""Both sizes of a weight must be multiples of this for the matrix units."""

CAPABILITY = (8, 9)
"""First CUDA compute capability with fp8 matrix units."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model there cannot have an fp8 suffix, to be continued with what to choose instead."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "needs an NVIDIA GPU with fp8 matrix units (compute capability 8.9 or later)"
    if dtype != torch.bfloat16:
        return "goes with dtype bfloat16"
    return None


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, k] in fp8 and the scale of each, float32 [n, 1]: rows = fp8 * scale."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(TINY) / LARGEST
    return (rows / scale).to(FP8), scale


_split: list[torch.Tensor] = []
"""The input that was split last, and its halves: q, k and v of a block share one."""


def _halves(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of states [..., 2T, K]: 2m and 2d of each token, one after the other, in fp8 [2T, K]; scales.

    The scales are halved, so what is scaled back is m and d.
    """
    if _split and _split[0] is states:
        return _split[1], _split[2]
    plus, minus = states.unflatten(-2, (2, -1)).float().unbind(-3)
    both = plus.unsqueeze(-2) + _signs(states.device)[:, None] * minus.unsqueeze(-2)
    rows, scale = rounded(both.flatten(0, -2))
    _split[:] = [states, rows, scale * 0.5]
    return _split[1], _split[2]


def _signs(device: torch.device) -> torch.Tensor:
    return 1 - 2 * torch.arange(2, device=device)


def _product(
    rows: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, scale_of_weight: torch.Tensor
) -> torch.Tensor:
    """Fp8 rows [2T, K] times an fp8 weight [N, K], scaled back: bfloat16 [2T, N]."""
    if not rows.is_cuda:
        wide = (rows.float() * scale) @ (weight.float() * scale_of_weight.t()).t()
        return wide.to(torch.bfloat16)
    return torch._scaled_mm(
        *(rows, weight.t()),
        scale_a=scale,
        scale_b=scale_of_weight,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class _PairLinear(nn.Linear):
    """What an ``nn.Linear`` is while a pair runs through it."""

    weight8: torch.Tensor
    """The weight in fp8, [N, K]."""
    scale8: torch.Tensor
    """Of each output row, float32 [1, N]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """States [..., 2T, K] of both points -> float32 [..., 2T, N]."""
        product = _product(*_halves(input), self.weight8, self.scale8)
        mean, half = product.float().unflatten(0, (-1, 2)).unbind(1)
        pair = mean + _signs(input.device)[:, None, None] * half
        if self.bias is not None:
            pair = pair + self.bias
        return pair.flatten(0, 1).unflatten(0, input.shape[:-1])


class _WideHead(nn.Linear):
    """What the head is meanwhile: logits that the model's dtype does not round."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float32 states [U, H] -> float32 logits [U, V], from two terms of the weight's dtype."""
        if not input.is_cuda:
            return F.linear(input, self.weight.float(), _cast(self.bias, torch.float32))
        high = input.to(self.weight.dtype)
        terms = torch.cat((high, (input - high).to(self.weight.dtype)))
        high, low = torch.mm(terms, self.weight.t(), out_dtype=torch.float32).chunk(2)
        return high + low if self.bias is None else high + low + self.bias


@cache
def _wide(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of norms whose weights are float32 meanwhile: it gives back the dtype it is given."""

    def forward(self: nn.Module, states: torch.Tensor, *args: Any) -> torch.Tensor:
        found: torch.Tensor = kind.forward(self, states.float(), *args)
        return found.to(states.dtype)

    return type(f"Wide{kind.__name__}", (kind,), {"forward": forward})


@cache
def _narrow(kind: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """A class of modules with matrices that stay as they are: they are given their own dtype.

    What they give back has the dtype of what they were given first.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = [v.dtype for v in (*args, *kwargs.values()) if _floating(v)]
        named = {name: _cast(value, dtype) for name, value in kwargs.items()}
        found = kind.forward(self, *(_cast(value, dtype) for value in args), **named)
        if not given:
            return found
        if isinstance(found, tuple):
            return tuple(_cast(value, given[0]) for value in found)
        return _cast(found, given[0])

    return type(f"Narrow{kind.__name__}", (kind,), {"forward": forward})


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _floating(value) else value


def _block(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's own forward on a float32 residual stream; no split input is kept after it.

    Written as a method of the block, so that all blocks of a class share one compilation.
    """
    if args:
        args = (args[0].float(), *args[1:])
    else:
        kwargs["hidden_states"] = kwargs["hidden_states"].float()
    out = type(self).forward(self, *args, **kwargs)
    _split.clear()
    return out


@cache
def _block_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """The same for one class of blocks: the compiler counts what it compiles by code object."""
    code = _block.__code__.replace(co_name=f"_block_of_{kind.__name__}")
    return FunctionType(code, globals())


class PairsInFp8:
    """The linear layers of some frozen blocks in fp8, for pairs of points."""

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        all_blocks: Sequence[nn.Module],
        compiled: bool,
    ) -> None:
        """Round the weights; one byte each.

        Args:
            model: the model.
            blocks: the frozen ones above the last tuned layer. Layers within a list (the experts of
                a mixture) see some of the tokens only, and stay as they are.
            all_blocks: those of the whole model.
            compiled: run the blocks through ``torch.compile``, which fuses splitting and rounding
                with the operations around them.
        """
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._kinds: dict[nn.Module, type[nn.Module]] = {}
        """What each module is meanwhile."""
        self._tensors: dict[nn.Module, dict[str, torch.Tensor]] = {}
        """Buffers of it that are there meanwhile, and parameters that stand in for its own."""
        for block in blocks:
            run = MethodType(_block_of(type(block)), block)  # type: ignore[arg-type]
            self._forwards[block] = torch.compile(run, dynamic=True) if compiled else run
            for name, module in block.named_modules():
                if type(module) is nn.Linear and _fits(name, module):
                    weight8, scale = rounded(module.weight.detach().float())
                    self._kinds[module] = _PairLinear
                    self._tensors[module] = {"weight8": weight8, "scale8": scale.t().contiguous()}
                elif module is not block:
                    self._carry(module)
        if not len(self):
            return
        inside = {module for block in all_blocks for module in block.modules()}
        head = model.get_output_embeddings()
        for module in model.modules():
            if module is head and type(module) is nn.Linear:
                self._kinds[module] = _WideHead
            elif module not in inside and not isinstance(module, nn.Embedding):
                self._carry(module)

    def _carry(self, module: nn.Module) -> None:
        """Have a module that is not in fp8 take and give float32."""
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if any(p.dim() > 1 for p in own.values()):
            self._kinds[module] = _narrow(type(module), next(iter(own.values())).dtype)  # type: ignore[arg-type]
        elif own and not list(module.children()):
            self._kinds[module] = _wide(type(module))  # type: ignore[arg-type]
            self._tensors[module] = {n: p.detach().float() for n, p in own.items()}

    def __len__(self) -> int:
        """How many linear layers are in fp8."""
        return sum(kind is _PairLinear for kind in self._kinds.values())

    def runs(self, module: nn.Module) -> bool:
        """Whether a block is one of those, or another module is another meanwhile."""
        return module in self._forwards or module in self._kinds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the blocks take a pair: states [1, 2T, H], of the one point and of the other."""
        with ExitStack() as undone:
            undone.enter_context(standing_in(self._forwards))
            undone.callback(_split.clear)
            for module, kind in self._kinds.items():
                undone.callback(_give_back, module, type(module), dict(module._parameters))  # type: ignore[arg-type]
                module.__class__ = kind
                for name, tensor in self._tensors.get(module, {}).items():
                    if name in module._parameters:
                        module._parameters[name] = tensor  # type: ignore[assignment]
                    else:
                        module._buffers[name] = tensor
            yield


def _fits(name: str, linear: nn.Linear) -> bool:
    in_a_list = any(part.isdigit() for part in name.split("."))
    return not in_a_list and not (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE)


def _give_back(module: nn.Module, kind: type[nn.Module], own: dict[str, Any]) -> None:
    module.__class__ = kind
    module._parameters.update(own)
    for name in ("weight8", "scale8"):
        module._buffers.pop(name, None)


@contextmanager
def standing_in(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within, modules run these forwards in place of their own."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward  # uncovers the class's own
