"""The tables of the grouped kernels, read as the kernels read them."""

import ctypes
import gc
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_core.zo.grouped import BLOCK, COLUMNS, Groups
from zo_core.zo.scope import TunedScope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])


def scope_of(shapes: list[tuple[int, torch.dtype, bool]]) -> TunedScope:
    """A scope of tensors of some sizes and dtypes, some of them masked."""
    parameters = {f"p{i}": torch.randn(n).to(d) for i, (n, d, _) in enumerate(shapes)}
    masks = {f"p{i}": torch.rand(n) < 0.5 for i, (n, _, masked) in enumerate(shapes) if masked}
    return TunedScope(parameters, masks)


@given(
    st.lists(st.tuples(SIZES, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_every_value_is_met_once(shapes: list[tuple[int, torch.dtype, bool]], outputs: int) -> None:
    """Program by program: its tensor, block and key, and addresses that hold the right data."""
    scope = scope_of(shapes)
    out = {n: [torch.empty_like(p) for _ in range(outputs)] for n, p in scope.parameters.items()}
    met = {name: torch.zeros(p.numel(), dtype=torch.int64) for name, p in scope.parameters.items()}
    names = list(scope.parameters)
    groups = Groups(scope).writing_to(out)
    assert {g.dtype for g in groups} == {d for _, d, _ in shapes}
    assert len(groups) == len({(d, n % 16 == 0) for n, d, _ in shapes})
    for group in groups:
        assert group.table.shape[1] == len(COLUMNS) - 1 + outputs
        for program, owner in enumerate(group.owners.tolist()):
            first, size, key, master, mask, *outs = group.table[owner].tolist()
            name = names[key]
            assert scope.parameters[name].dtype == group.dtype
            start = (program - first) * BLOCK
            assert 0 <= start < size == scope.parameters[name].numel()
            met[name][start : start + BLOCK] += 1
            assert outs == [t.data_ptr() for t in out[name]]
            value = ctypes.c_float.from_address(master + 4 * start).value
            assert value == float(scope.master[name][start])
            assert bool(mask) == (name in scope.masks)
            if mask:
                assert group.masked
                flag = ctypes.c_uint8.from_address(mask + start).value
                assert flag == int(scope.masks[name][start])
    assert all(bool((counts == 1).all()) for counts in met.values())


def test_tables_are_made_once_and_let_the_scope_go() -> None:
    """Again the same for the same outputs, others for others; nothing keeps a closed scope."""
    scope = scope_of([(5, torch.float32, False), (9, torch.bfloat16, True)])
    groups = Groups(scope)
    itself = {n: [p] for n, p in scope.parameters.items()}
    other = {n: [torch.empty_like(p)] for n, p in scope.parameters.items()}
    assert groups.writing_to(itself) is groups.writing_to(itself)
    assert groups.writing_to(itself) is not groups.writing_to(other)
    gone = weakref.ref(scope)
    del scope
    gc.collect()
    assert gone() is None


def test_a_view_at_an_odd_address_is_not_called_aligned() -> None:
    """Reading several values at once from it would be a fault."""
    whole = torch.randn(64)
    aligned, odd = (
        Groups(scope).writing_to({n: [p] for n, p in scope.parameters.items()})[0].aligned
        for scope in (TunedScope({"a": whole[:32]}), TunedScope({"a": whole[1:33]}))
    )
    assert aligned
    assert not odd
    ragged = Groups(TunedScope({"a": whole[:31]})).writing_to({"a": [whole[:31]]})
    assert not ragged[0].aligned
