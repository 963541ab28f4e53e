"""Losses of several points at once, and sums that do not depend on who adds first."""

import pytest
import torch

from tests.unit.test_forward import SEVERAL, SINGLE
from zo_core.tasks.scoring import Scored, candidate_scores, layout, task_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _scored(examples: list, device: str) -> tuple[Scored, torch.Tensor]:
    """A layout, and logits [3 points, U, V] for it."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    _, scored = layout(
        *(examples, lambda e: e.rows, lambda _row, at: at),
        torch.device("cpu"),
    )
    torch.manual_seed(0)
    logits = torch.randn(3, len(scored.position), 50)
    return scored.to(torch.device(device)), logits.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "examples", [SINGLE, SEVERAL, [e.gold for e in SEVERAL]], ids=["one", "several", "gold"]
)
def test_points_at_once_are_points_one_by_one(examples: list, device: str) -> None:
    scored, logits = _scored(examples, device)
    together = task_loss(logits, scored)
    assert together.shape == (3,)
    alone = torch.stack([task_loss(one, scored) for one in logits])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_means_over_a_candidates_tokens(device: str) -> None:
    """Written out, candidate by candidate; and the same bits a second time."""
    scored, logits = _scored(SEVERAL, device)
    got = candidate_scores(logits[0], scored)
    assert torch.equal(got, candidate_scores(logits[0], scored))
    log_probability = logits[0].double().log_softmax(-1).cpu()
    at = 0
    for example, scores in zip(SEVERAL, got.cpu(), strict=True):
        for candidate, score in zip(example.candidates, scores, strict=True):
            own = range(at, at + len(candidate.scored))
            places = scored.place[list(own)].cpu()
            found = log_probability[places, torch.tensor(candidate.scored)].mean()
            assert float(score) == pytest.approx(float(found), rel=1e-5)
            at += len(own)
