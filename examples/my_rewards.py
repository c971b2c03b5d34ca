"""A reward of your own: `c2f-ray train RECIPE "reward={kind: function, function: 'examples.my_rewards:score'}"`.

It is called with a list of samples, in a process that imports this file from the working directory of the run; with
`async def` it may wait for a server. What it raises, or a reward that is not finite, is handled as `reward.on_failure`
says.
"""

import re
from typing import Any

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def score(samples: list[Any]) -> list[float]:
    """1 where the last number of the response is the prompt's `answer`; 0.1 less where the limit cut it."""
    return [_right(sample) - 0.1 * (not sample.finished) for sample in samples]


def _right(sample: Any) -> float:
    numbers = NUMBER.findall(sample.response)
    return float(bool(numbers) and float(numbers[-1]) == float(sample.record["answer"]))
