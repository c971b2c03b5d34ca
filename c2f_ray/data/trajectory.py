"""The ragged batch that flows from rollout actors to reward workers and learner ranks.

Invariant: the driver holds references to these and never the arrays themselves; what it sees is `TrajectoryInfo`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """Rows of different length in one flat array: row ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    values: NDArray[np.generic]  # [total]
    offsets: Int64  # [rows + 1]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float] | NDArray[np.generic]], dtype: type) -> "Ragged":
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.empty(0, dtype)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    def select(self, rows: Sequence[int] | Int64) -> "Ragged":
        return Ragged.from_rows([self[int(row)] for row in rows], self.values.dtype.type)


@dataclass(frozen=True)
class TrajectoryInfo:
    """What the driver may know of a shard: a few dozen bytes for each of its ``N`` trajectories."""

    sample_id: Int64  # [N] unique within a step
    prompt_row: Int64  # [N] row of the PromptSet
    greedy: Bool  # [N] ReMax's greedy rollout
    finished: Bool  # [N] ended by itself; False: cut by the limit, or interrupted
    interrupted: Bool  # [N] the rest is still to be sampled
    prompt_tokens: Int32  # [N] count
    response_tokens: Int32  # [N] count, end-of-sequence token included
    weight_version: Int32  # [N] version of the weights that sampled its first token

    def __len__(self) -> int:
        return len(self.sample_id)

    def select(self, rows: Int64 | Bool) -> "TrajectoryInfo":
        return TrajectoryInfo(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def concat(cls, parts: Sequence["TrajectoryInfo"]) -> "TrajectoryInfo":
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True)
class Trajectories:
    """A shard of ``N`` trajectories, token in and token out."""

    info: TrajectoryInfo
    prompt: Ragged  # int32 token ids
    response: Ragged  # int32 token ids, end-of-sequence token included when the response ended by itself
    sampler_logprobs: Ragged  # float32, one for each response token, of the distribution before temperature and top_p
    token_version: Ragged  # int32, one for each response token: version of the weights that sampled it

    def __len__(self) -> int:
        return len(self.info)

    def select(self, rows: Int64) -> "Trajectories":
        return Trajectories(
            self.info.select(rows),
            self.prompt.select(rows),
            self.response.select(rows),
            self.sampler_logprobs.select(rows),
            self.token_version.select(rows),
        )

    @classmethod
    def concat(cls, shards: Sequence["Trajectories"]) -> "Trajectories":
        def join(name: str) -> Ragged:
            parts: list[Ragged] = [getattr(shard, name) for shard in shards]
            rows = [part[i] for part in parts for i in range(len(part))]
            return Ragged.from_rows(rows, parts[0].values.dtype.type)

        infos = TrajectoryInfo.concat([shard.info for shard in shards])
        return cls(infos, join("prompt"), join("response"), join("sampler_logprobs"), join("token_version"))
