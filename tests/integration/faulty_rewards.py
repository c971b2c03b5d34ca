"""Rewards that fail as a user's may; a prompt's record says how."""

import os
import time
from pathlib import Path

FAULTS = ("raises", "hangs", "nan", "string", "exits", "count")


def score(samples):
    found = []
    for sample in samples:
        fault = sample.record.get("fault")
        if fault == "raises":
            raise KeyError("no such answer")
        if fault == "once" and not (path := Path(sample.record["path"])).exists():
            path.touch()
            raise ConnectionError("try again")
        if fault == "hangs":
            time.sleep(600)
        if fault == "exits":
            os._exit(1)
        if fault == "count":
            continue
        found.append({"nan": float("nan"), "string": "good"}.get(fault, float(len(sample.response))))
    return found


def slow(samples):
    time.sleep(0.15)
    return [1.0] * len(samples)
