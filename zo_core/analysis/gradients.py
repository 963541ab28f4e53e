"""The distribution of a layer's projected gradients over draws of z and over batches. No torch."""

import numpy as np
import pandas as pd


def distribution(batches: pd.DataFrame) -> pd.DataFrame:
    """Mean, spread, signal-to-noise ratio and sign agreement of projected gradients, by layer.

    With ``g(d, b)`` of draw d on batch b, D draws and B batches:

    * ``mean``, ``sd`` over draws of the mean over batches; z is symmetric, so the mean is 0 up to
      its standard error ``sd / sqrt(D)``.
    * ``rms``: root mean square of the same, which estimates the norm of the layer's gradient.
    * ``snr``: ``sqrt(S / N)``. N is the mean over draws of the (unbiased) variance of g over
      batches: what the choice of the batch adds. S is the mean over draws of the squared mean over
      batches, less N / B, and at least 0: what all batches agree on. NaN for one batch.
    * ``sign_agreement``: the share of pairs of batches whose g has the same sign for the same z,
      mean over draws: 1 if the batch does not matter, 1/2 if g is noise. A zero agrees with
      nothing. NaN for one batch.

    Args:
        batches: ``layer, draw, batch, projected_gradient``.

    Returns:
        ``layer, mean, sd, rms, snr, sign_agreement, draws, batches``.
    """
    rows = []
    for layer, table in batches.groupby("layer"):
        g = table.pivot(index="draw", columns="batch", values="projected_gradient").to_numpy()
        draws, count = g.shape
        over = g.mean(axis=1)
        snr = agreement = np.nan
        if count > 1:
            noise = g.var(axis=1, ddof=1).mean()
            signal = max(float((over**2).mean() - noise / count), 0.0)
            snr = np.sqrt(signal / noise) if noise else np.inf
            agreement = _pairs_alike(g)
        rows.append(
            (
                layer,
                over.mean(),
                over.std(ddof=1) if draws > 1 else np.nan,
                np.sqrt((over**2).mean()),
                snr,
                agreement,
                draws,
                count,
            )
        )
    columns = ["layer", "mean", "sd", "rms", "snr", "sign_agreement", "draws", "batches"]
    return pd.DataFrame(rows, columns=columns)


def _pairs_alike(g: np.ndarray) -> float:
    """Share of pairs of columns with the same sign, mean over the rows of [D, B]."""
    count = g.shape[1]
    alike = sum(((n := (side > 0).sum(axis=1)) * (n - 1)).astype(float) for side in (g, -g))
    return float(np.mean(alike / (count * (count - 1))))
