"""Streaming statistics of a tensor that is seen in pieces: constant memory, no piece is kept.

Sums are float64, maxima and counts exact. Quantiles and shares come from a histogram over the
leading 15 bits of the float32 pattern of the magnitude (8 exponent and 7 mantissa bits): a bin is
at most 2**-7 wide relative to its value and its middle is reported, so a quantile is within 0.4 %
of the entry of that rank. The thresholds of :data:`ABOVE` are edges of bins: shares are exact.
"""

import math

import torch

from zo_core.analysis.kernels import statistics as kernels

TOP = 3
QUANTILES = {
    "median": 500,
    "q01": 10,
    "q10": 100,
    "q25": 250,
    "q75": 750,
    "q90": 900,
    "q99": 990,
    "q999": 999,
}
"""Column -> rank in thousandths."""
ABOVE = {"above6": 6.0, "above10": 10.0, "above100": 100.0, "above1000": 1000.0}
"""Column -> magnitude."""
FEATURE = 6.0
"""Magnitude of an outlier feature in LLM.int8() (Dettmers et al. 2022)."""
SHIFT = 16  # float32 pattern of a magnitude -> bin
BINS = 1 << 15
INFINITE = 0x7F80
"""First bin of infinity and NaN."""
PIECE = 1 << 17
"""Entries taken at a time on a CPU, so that intermediate tensors stay in its caches."""
WAITING = 64
"""Pieces whose largest entries wait on the device."""
NOWHERE = torch.iinfo(torch.int64).max


class Statistics:
    """Running statistics of one tensor with ``channels`` channels."""

    def __init__(self, channels: int, device: torch.device, by_channel: bool = False) -> None:
        """Start empty.

        Args:
            channels: places are counted as ``token * channels + channel``.
            device: where the pieces will be.
            by_channel: also keep the largest magnitude of every channel, and the number of tokens
                at which it is at least :data:`FEATURE`.
        """
        self.channels = channels
        self.histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        """Sums of |x|, x, x^2, x^3, x^4."""
        self.top = torch.full((TOP,), -1.0, device=device)
        """The largest magnitudes, descending; -1: fewer entries than that."""
        self.top_value = torch.full((TOP,), math.nan, device=device)
        self.top_place = torch.full((TOP,), NOWHERE, dtype=torch.int64, device=device)
        self.first_nonfinite = torch.full((), NOWHERE, dtype=torch.int64, device=device)
        """Token with the first NaN or infinite entry."""
        self.candidates: list[tuple[torch.Tensor, int, int]] = []
        """(keys, first token, width) of pieces whose largest entries are still to be merged."""
        self.channel_max = torch.zeros(channels if by_channel else 0, device=device)
        self.channel_tokens = torch.zeros(
            channels if by_channel else 0, dtype=torch.int64, device=device
        )

    @property
    def by_channel(self) -> bool:
        """Whether statistics by channel are kept."""
        return bool(len(self.channel_max))

    def add(
        self, states: torch.Tensor, tokens: torch.Tensor | int, first: torch.Tensor | None = None
    ) -> None:
        """Take in a piece.

        Args:
            states: floating point [N, C].
            tokens: int64 [N], the token of each row; or the first of consecutive ones.
            first: int64 [N], the channel of each row's first entry; None: 0.
        """
        if not states.numel():
            return
        if isinstance(tokens, int):
            if first is None and kernels.usable(states):
                kernels.add(self, states.contiguous(), tokens)
                if len(self.candidates) >= WAITING:
                    self._settle()
                return
            tokens = torch.arange(tokens, tokens + len(states), device=states.device)
        rows = max(1, PIECE // states.shape[1]) if states.device.type == "cpu" else len(states)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            self._add(states[part].float(), tokens[part], None if first is None else first[part])

    def _settle(self) -> None:
        """Merge the candidates that the kernel left."""
        for keys, start, width in self.candidates:
            magnitude, value, place = kernels.read(keys)
            token = start + place // width
            self.merge(magnitude, value, token * self.channels + place % width)
        self.candidates.clear()

    def _add(self, x: torch.Tensor, tokens: torch.Tensor, first: torch.Tensor | None) -> None:
        magnitude = x.abs()
        bins = (magnitude.view(torch.int32) >> SHIFT).flatten()
        counts = torch.bincount(bins, minlength=BINS)
        self.histogram += counts
        if bool(counts[INFINITE:].any()):
            finite = magnitude.isfinite()
            broken = ~finite.all(-1)
            self.first_nonfinite = torch.minimum(self.first_nonfinite, tokens[broken].min())
            x, magnitude = x.where(finite, 0.0), magnitude.where(finite, 0.0)
            self._rank(magnitude.masked_fill(~finite, -1.0), x, tokens, first)
        else:
            self._rank(magnitude, x, tokens, first)
        wide = x.double()
        square = wide * wide
        self.sums += torch.stack(
            [
                wide.abs().sum(),
                wide.sum(),
                square.sum(),
                (square * wide).sum(),
                (square * square).sum(),
            ]
        )
        if self.by_channel:
            largest = magnitude.amax(0)
            self.channel_max = torch.maximum(self.channel_max, largest)
            if bool((largest >= FEATURE).any()):
                self.channel_tokens += (magnitude >= FEATURE).sum(0, dtype=torch.int32)

    def _rank(
        self,
        magnitude: torch.Tensor,
        x: torch.Tensor,
        tokens: torch.Tensor,
        first: torch.Tensor | None,
    ) -> None:
        """Merge the largest entries, -1 standing for none; few rows are looked at closely."""
        largest = magnitude.amax(-1)
        least = largest.topk(min(TOP, len(largest))).values[-1] if len(largest) >= TOP else -1.0
        candidates = largest >= torch.maximum(
            torch.as_tensor(least, device=x.device), self.top[-1].clamp(min=0)
        )
        rows = candidates.nonzero()[:, 0]
        if not len(rows):
            return
        found = magnitude[rows].flatten()
        width = magnitude.shape[1]
        best = (found >= found.topk(min(TOP, len(found))).values[-1]).nonzero()[:, 0]
        row, column = rows[best // width], best % width
        channel = column if first is None else column + first[row]
        self.merge(found[best], x[row, column], tokens[row] * self.channels + channel)

    def merge(self, magnitude: torch.Tensor, value: torch.Tensor, place: torch.Tensor) -> None:
        """Merge candidates [K] for the largest entries; a magnitude of -1 stands for none."""
        place = place.where(magnitude >= 0, NOWHERE)
        magnitudes = torch.cat([self.top, magnitude])
        places = torch.cat([self.top_place, place])
        values = torch.cat([self.top_value, value])
        by_place = places.sort(stable=True).indices
        order = by_place[magnitudes[by_place].sort(descending=True, stable=True).indices[:TOP]]
        self.top, self.top_place = magnitudes[order], places[order]
        self.top_value = values[order]

    def row(self) -> dict[str, float]:
        """Every number but the places, as in docs/scan.md; NaN where nothing finite was seen."""
        self._settle()
        counts = self.histogram.cpu()
        nonfinite = int(counts[INFINITE:].sum())
        counts = counts[:INFINITE]
        count = int(counts.sum())
        total, s1, s2, s3, s4 = (self.sums / max(count, 1)).tolist() if count else [math.nan] * 5
        variance = s2 - s1 * s1
        fourth = s4 - 4 * s1 * s3 + 6 * s1 * s1 * s2 - 3 * s1**4
        below = counts.cumsum(0)
        ranks = torch.tensor([-(-rank * count // 1000) for rank in QUANTILES.values()])
        bins = torch.searchsorted(below, ranks)
        found: dict[str, float] = {f"top{r + 1}": v for r, v in enumerate(self._tops())}
        middles = _middles(bins) if count else [math.nan] * len(QUANTILES)
        found |= dict(zip(QUANTILES, middles, strict=True))
        found["mean"] = total
        found["rms"] = math.sqrt(s2) if count else math.nan
        found["kurtosis"] = fourth / variance**2 if count and variance > 0 else math.nan
        for name, threshold in ABOVE.items():
            smaller = int(below[_bin(threshold) - 1])
            found[name] = (count - smaller) / count if count else math.nan
        found["count"], found["nonfinite"] = count, nonfinite
        return found

    def _tops(self) -> list[float]:
        return [m if m >= 0 else math.nan for m in self.top.tolist()]

    def places(self) -> list[tuple[int, int, float]]:
        """(token, channel, signed value) of the largest entries, largest first."""
        self._settle()
        kept = zip(self.top_place.tolist(), self.top_value.tolist(), strict=True)
        return [(*divmod(p, self.channels), v) for p, v in kept if p != NOWHERE]

    def broken_token(self) -> int | None:
        """The first token with a NaN or infinite entry."""
        token = int(self.first_nonfinite)
        return None if token == NOWHERE else token


def _bin(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32)) >> SHIFT


def _middles(bins: torch.Tensor) -> list[float]:
    """Middle of each bin; of the last finite one, its lower edge."""
    low = (bins << SHIFT).to(torch.int32).view(torch.float32)
    high = ((bins + 1) << SHIFT).to(torch.int32).view(torch.float32)
    return torch.where(high.isinf(), low, low + (high - low) / 2).tolist()
