"""Job specs about a tuning run that is there already: replay it, export it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Device = Literal["auto", "cpu", "cuda"]
Form = Literal["tensors", "model", "adapter", "ledger"]
Weights = Literal["kept", "best", "last"]
TUNE_ID = r"^\d{8}-\d{6}-tune-[0-9a-f]{6}$"


class ReplayJob(BaseModel):
    """Rebuild tuned weights from base weights and ledger, and compare."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    kind: Literal["replay"] = "replay"
    run: str | None = Field(None, pattern=TUNE_ID, description="id of a tuning run")
    ledger: Path | None = Field(None, description="an exported ledger, in place of a run")
    out: Path | None = Field(None, description="with ledger: file for the rebuilt tensors")
    model: str | None = Field(
        None, min_length=1, max_length=512, description="with ledger: the base model, if elsewhere"
    )
    device: Device = Field("auto", description="auto: GPU if any")
    force: bool = Field(False, description="with out: replace what is there")

    @model_validator(mode="after")
    def _one_source(self) -> "ReplayJob":
        if self.run is None and self.ledger is None:
            raise ValueError("run is missing: give the id of a tuning run, or a ledger file")
        if self.ledger is not None and self.run is None and self.out is None:
            raise ValueError("out is missing: name the file for the rebuilt tensors")
        if self.run is not None:
            for name in ("ledger", "out", "model"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does not go with run: leave one of them out")
        return self


class ExportJob(BaseModel):
    """Write a tuning run's weights, or its ledger, in a form that other programs read."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    kind: Literal["export"] = "export"
    run: str = Field(..., pattern=TUNE_ID, description="id of a tuning run")
    form: Form = Field("tensors", description="what is written")
    out: Path | None = Field(None, description="file or folder; none given: exports/ of the run")
    weights: Weights = Field(
        "kept", description="kept: what the run kept; without a best file always the last"
    )
    device: Device = Field("auto", description="where the model is loaded; auto: GPU if any")
    force: bool = Field(False, description="replace a file; move a folder in the way aside")
