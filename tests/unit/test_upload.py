"""One copy for many tensors."""

import pytest
import torch

from zo_core.upload import upload


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_arrive_as_they_were(device: str) -> None:
    """Whatever their shapes and dtypes, empty ones included."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    sent = [
        torch.tensor([1, 2**40, -3]),
        torch.tensor([[0.1, 0.2, 0.3]]),
        torch.tensor(7),
        torch.zeros(0, 4),
        torch.tensor([True, False, True]),
        torch.arange(11, dtype=torch.int32),
        torch.tensor([1.0 / 3], dtype=torch.float64),
    ]
    for before, after in zip(sent, upload(sent, torch.device(device)), strict=True):
        assert after.device.type == device
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert torch.equal(after.cpu(), before)
