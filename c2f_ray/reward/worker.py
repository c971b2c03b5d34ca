"""One reward worker: tokens back into text with the policy's tokenizer; a reward model reads it with its own."""

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from c2f_ray.data.prompts import PromptSet
from c2f_ray.data.tokenizer import decode, load_tokenizer
from c2f_ray.data.trajectory import Trajectories
from c2f_ray.recipe import FunctionReward, LogRatioReward, UltraRMReward
from c2f_ray.recipe.roles import Scorer
from c2f_ray.reward.batching import Batcher
from c2f_ray.reward.function import FunctionScorer
from c2f_ray.reward.log_ratio import LogprobScorer
from c2f_ray.reward.samples import Sample, score_each
from c2f_ray.reward.ultrarm import UltraRMScorer

Float64 = NDArray[np.float64]


class RewardWorker:
    def __init__(self, scorer: Scorer, policy_tokenizer: str, prompts: PromptSet, ordered: bool) -> None:
        self.policy_tokenizer = policy_tokenizer
        self.prompts = prompts
        self.function = None
        match scorer.reward:
            case FunctionReward() as reward:
                self.function = FunctionScorer(reward)
                return
            case LogRatioReward() as reward:
                assert scorer.model is not None
                self.model = LogprobScorer(reward, scorer.model)
            case UltraRMReward() as reward:
                self.model = UltraRMScorer(reward)
            case unknown:
                assert_never(unknown)
        self.batcher = Batcher(self.model.score, reward.tokens_per_batch, reward.max_wait_s, not ordered)

    def ready(self) -> bool:
        return True

    def score(self, shard: Trajectories | list[Sample], rows: list[int]) -> tuple[Float64, dict[int, str]]:
        """The scores of these rows, NaN where there is none, and for each of those the cause."""
        samples = shard if isinstance(shard, list) else self._samples(shard)
        asked = [samples[row] for row in rows]
        found = score_each(self.function.score, asked) if self.function else self._batched(asked)
        causes = {row: score for row, score in zip(rows, found, strict=True) if isinstance(score, str)}
        return np.array([np.nan if isinstance(score, str) else score for score in found]), causes

    def _batched(self, samples: list[Sample]) -> list[float | str]:
        """A sample that cannot be encoded takes no other with it."""
        encoded = []
        found: list[float | str] = [""] * len(samples)
        for row, sample in enumerate(samples):
            try:
                encoded.append((row, self.model.encode(sample)))
            except Exception as error:  # templates and tokenizers may raise anything
                found[row] = f"{type(error).__name__}: {error}"
        scores = self.batcher.score([conversation for _, conversation in encoded])
        for (row, _), score in zip(encoded, scores, strict=True):
            found[row] = score
        return found

    def _samples(self, shard: Trajectories) -> list[Sample]:
        tokenizer = load_tokenizer(self.policy_tokenizer)
        return [
            Sample(
                messages=self.prompts.messages[row],
                response=decode(tokenizer, shard.response[i], special=False),
                finished=bool(shard.info.finished[i]),
                record=self.prompts.records[row],
            )
            for i, row in enumerate(shard.info.prompt_row.tolist())
        ]
