"""The attention, the MLP and the linear layers of a decoder block, found by structure.

A block's children that hold linear layers are its mixers (attention, or what stands in its place:
they move information between tokens) and its MLP. Where there is no MLP module, as in OPT, the
linear layers that hang directly in the block are the MLP. Which linear layer is the
down-projection, and which the attention's output projection, is not looked up by name: it is the
last one to run that writes as many channels as the block has
(see :mod:`zo_core.analysis.observe`).
"""

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
_MIXER = re.compile(
    r"att|mixer|mamba|ssm|conv|recurrent|temporal|retention|delta|rwkv|time_mix", re.IGNORECASE
)
_MLP = re.compile(r"mlp|ffn?$|feed|moe|expert", re.IGNORECASE)
"""Names of an MLP, whatever the name of its class says."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A module that holds the weights of all experts stacked."""

    module: nn.Module
    count: int
    width: int
    """Input neurons of one expert's down-projection."""


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The parts of one decoder block."""

    mixer: nn.Module | None
    mlp: nn.Module | None
    """None if there is none, or if it has no module of its own."""
    experts: Experts | None
    linears: tuple[nn.Module, ...]
    """Every linear layer of the block, nn.Linear or Conv1D."""
    mixer_linears: frozenset[nn.Module]
    mlp_linears: frozenset[nn.Module]
    readable: bool
    """Whether the down-projection can be read: False for experts of an unknown kind."""


def find_parts(block: nn.Module) -> BlockParts:
    """Take a decoder block apart; it may be on the meta device."""
    mixers: list[nn.Module] = []
    others: list[nn.Module] = []
    loose: list[nn.Module] = []
    for name, child in block.named_children():
        if isinstance(child, LINEAR):
            loose.append(child)
        elif any(p.dim() > 1 for p in child.parameters()):
            kind = name if _MLP.search(name) else f"{name} {type(child).__name__}"
            mixes = _MIXER.search(kind)
            (mixers if mixes else others).append(child)
    mixer = mixers[0] if mixers else None
    mlp = others[0] if len(others) == 1 else None
    experts = next(filter(None, map(_experts, mlp.modules())), None) if mlp is not None else None
    many = mlp is not None and any(isinstance(m, nn.ModuleList) and len(m) for m in mlp.modules())
    own = _linears(mlp) if mlp is not None else frozenset(loose if not others else [])
    return BlockParts(
        mixer=mixer,
        mlp=mlp,
        experts=experts,
        linears=tuple(m for m in block.modules() if isinstance(m, LINEAR)),
        mixer_linears=_linears(mixer) if mixer is not None else frozenset(),
        mlp_linears=own,
        readable=bool(own or experts) and not many and not _other_stacks(mlp, experts),
    )


def _linears(module: nn.Module) -> frozenset[nn.Module]:
    return frozenset(m for m in module.modules() if isinstance(m, LINEAR))


def _experts(module: nn.Module) -> Experts | None:
    """Stacked experts as transformers' own interface calls them, if this module is one."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.dim() != 3 or not hasattr(module, "_apply_gate"):
        return None
    transposed = getattr(module, "is_transposed", False)
    return Experts(module, down.shape[0], down.shape[1 if transposed else 2])


def _other_stacks(mlp: nn.Module | None, experts: Experts | None) -> bool:
    """Whether an MLP holds stacked weights that are not those experts."""
    if mlp is None:
        return False
    known = set(experts.module.parameters()) if experts is not None else set()
    return any(p.dim() > 2 and p not in known for p in mlp.parameters())
