"""Log probability of a response under one model; a log-ratio reward takes it from two (RewardBench, arXiv 2403.13787).

    r(x, y) = sum_t log pi(y_t | x, y_<t) - sum_t log pi_ref(y_t | x, y_<t)

over the response's tokens, end-of-sequence token included. Each model has workers of its own; the difference of their
scores is taken in the driver, in float64.
"""

import math
from typing import Any

from c2f_ray.adapters.vllm import build_llm, prompt_logprobs
from c2f_ray.data.templates import chat_template, render
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.recipe import LogRatioReward
from c2f_ray.reward.samples import Encoded, Sample, appends_eos, cut_front


class LogprobScorer:
    """`model` is one of the pair; both read the ids of the policy model's tokenizer and template."""

    def __init__(self, reward: LogRatioReward, model: str) -> None:
        self.reward = reward
        self.tokenizer = load_tokenizer(reward.policy_model)
        self.template = chat_template(reward.chat_template, self.tokenizer, "reward.chat_template")
        max_batched_tokens = max(reward.tokens_per_batch, reward.max_tokens + 1)
        self.llm = build_llm(
            model,
            reward.gpus_per_worker,
            reward.memory,
            max_batched_tokens,
            dtype=reward.dtype,
            max_model_len=reward.max_tokens + 1,  # an engine generates one token at least
            max_num_batched_tokens=max_batched_tokens,
            enable_prefix_caching=False,  # a cached token has no logprob
        )

    def encode(self, sample: Sample) -> Encoded:
        return encode(self.reward, self.tokenizer, self.template, sample)

    def score(self, conversations: list[Encoded]) -> list[float]:
        """Returns the sum, or the mean, of each response's logprobs, in nats."""
        found = prompt_logprobs(self.llm, [encoded.ids for encoded in conversations])
        scores = []
        for encoded, of_prompt in zip(conversations, found, strict=True):
            # The first token of all has no logprob, so the list begins with the second one's.
            logprobs = of_prompt[max(0, encoded.response_start - 1) :]
            total = math.fsum(logprobs)
            scores.append(total / max(1, len(logprobs)) if self.reward.aggregate == "mean" else total)
        return scores


def encode(reward: LogRatioReward, tokenizer: Any, template: str, sample: Sample) -> Encoded:
    """The pair's own conversation and where its response begins.

    The whole conversation is rendered and read at once, as in training; what its template puts behind the response is
    left out. A response that looks like special tokens is read as plain text.
    """
    messages = [*sample.messages, {"role": "assistant", "content": sample.response}]
    text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    response = sample.response if sample.response in text else sample.response.strip()  # templates strip
    start = text.rfind(response) if response else len(render(tokenizer, template, sample.messages))
    if start < 0:
        raise ValueError(f"the chat template does not render the response {sample.response[:100]!r} as it is")
    end = start + len(response)
    found = tokenizer(text[:end], add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = found["input_ids"]
    response_start = next((i for i, (_, stop) in enumerate(found["offset_mapping"]) if stop > start), len(ids))
    if set(ids[response_start:]) & set(tokenizer.all_special_ids):
        ids = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
        response_start = len(ids)
        ids = ids + tokenizer(response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if appends_eos(reward, sample):
        ids = [*ids, tokenizer.eos_token_id]
    return cut_front(ids, response_start, reward.max_tokens, tokenizer.bos_token_id)
