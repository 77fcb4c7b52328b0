"""The one configuration of a PiKV cache: a YAML file, checked before anything is computed."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_SHARDS = 32


class PiKVConfig(BaseModel):
    """Where KV is stored and how it is read. The defaults are lossless.

    Attributes:
        page_size: tokens a page (and a token buffer) holds, S.
        token_shards: N_tok of the shard hash, a power of two; None: the expert-parallel size.
        expert_shards: N_exp of the shard hash, a power of two; 1 places by position only.
        hash_block: consecutive positions that share a token hash, b; None: `page_size`.
        replicas: shards that store each token, those of its best experts.
        num_sinks: first tokens of a sequence that stay in the home rank's stream window.
        window: last tokens of a sequence that stay in the home rank's stream window.
        flush_interval: decode steps between two flushes from the window to the shards.
        prefill_chunk_size: prompt tokens a forward pass takes at once; None: the whole prompt.
        dispatcher: how queries and KV travel between ranks.
        router: which shards a query visits.
        selector: which of their pages it reads.
        retention: which pages stay when a shard is full.
        codec: how sealed pages are compressed.
        sketch: what the home rank remembers of every page.
        max_sequence_length: capacity, tokens a sequence; None: the model's maximum.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    page_size: int = Field(64, ge=1)
    token_shards: int | None = Field(None, ge=1)
    expert_shards: int = Field(1, ge=1)
    hash_block: int | None = Field(None, ge=1)
    replicas: int = Field(1, ge=1)
    num_sinks: int = Field(4, ge=0)
    window: int = Field(128, ge=0)
    flush_interval: int = Field(16, ge=1)
    prefill_chunk_size: int | None = Field(None, ge=1)
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    router: Literal["all"] = "all"
    selector: Literal["all"] = "all"
    retention: Literal["all"] = "all"
    codec: Literal["none"] = "none"
    sketch: Literal["none", "mean_key", "bounding_box"] = "none"
    max_sequence_length: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_fields_together(self) -> "PiKVConfig":
        for field in ("token_shards", "expert_shards"):
            value = getattr(self, field)
            if value is not None and (value & (value - 1) or value > MAX_SHARDS):
                raise ValueError(f"{field} must be a power of two up to {MAX_SHARDS}, got {value}")
        if self.replicas > 1 and self.expert_shards == 1:
            raise ValueError(
                f"replicas {self.replicas} needs expert_shards above 1: with one expert shard "
                "every replica of a token falls into the same shard"
            )
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> "PiKVConfig":
        """Read a YAML file.

        Raises:
            ValueError: the file is missing or no mapping, or a key is unknown or out of range.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot read the PiKV configuration: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of PiKVConfig fields")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(f"{path}: {error}") from error

    def num_shards(self, expert_parallel_size: int) -> int:
        """N, the number of shards of a sequence.

        Raises:
            ValueError: `expert_parallel_size` does not divide it.
        """
        num = max(self.token_shards or expert_parallel_size, self.expert_shards)
        if num & (num - 1) or num % expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size {expert_parallel_size} must divide the number of shards "
                f"{num}, the larger of token_shards and expert_shards, a power of two"
            )
        return num
