"""examples/: the reward. The scripts are run in e2e/test_chain.py and e2e/test_sweep.py."""

import runpy
from pathlib import Path
from types import SimpleNamespace

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_my_rewards():
    score = runpy.run_path(str(EXAMPLES / "my_rewards.py"))["score"]
    record = {"answer": "3"}
    texts = [("so 2, no, so 3", True), ("so 3.0", False), ("so 2", True), ("I do not know", True)]
    samples = [SimpleNamespace(response=text, finished=finished, record=record) for text, finished in texts]
    assert score(samples) == [1.0, 0.9, 0.0, 0.0]
