"""Paths, environment and limits: the only place that reads ``ZO_*`` variables.

``ZO_CACHE_DIR`` run store and engine state (default ``cache/`` beside the app);
``ZO_DATA_DIR`` local task data; ``ZO_BACKEND`` address of a Dask scheduler (``tcp://host:8786``,
``tls://host:8786``), empty for the embedded engine; ``ZO_CANCEL_GRACE`` seconds a cancelled job
may take to stop by itself before its worker is killed; ``ZO_WORKERS_PER_DEVICE`` worker processes
that share one GPU, or the CPU, each with its own copy of the model.
"""

from functools import lru_cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Settings of one process, read once from the environment."""

    model_config = SettingsConfigDict(env_prefix="ZO_", extra="ignore")

    cache_dir: Path = ROOT / "cache"
    data_dir: Path | None = None
    backend: str = ""
    cancel_grace: float = Field(default=10.0, gt=0, description="seconds")
    heartbeat_timeout: float = Field(default=30.0, gt=1, description="seconds")

    workers_per_device: int = Field(default=1, ge=1, le=64)

    @property
    def runs_dir(self) -> Path:
        """Folder of the run store."""
        return self.cache_dir / "runs"

    @property
    def comparisons_dir(self) -> Path:
        """Folder of the comparisons."""
        return self.cache_dir / "comparisons"

    @property
    def engine_dir(self) -> Path:
        """Folder where the engine and its workers publish their state."""
        return self.cache_dir / "engine"


@lru_cache
def settings() -> Settings:
    """The settings of this process."""
    return Settings()
