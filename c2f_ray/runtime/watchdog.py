"""Says which actor has been silent for long, and what it was asked to do. What then happens is up to the deadlines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Thread

LOOK_S = 5.0
SHARE = 0.25  # of its deadline: when an actor's silence is first told; then after twice as long


@dataclass(frozen=True)
class Busy:
    actor: str
    doing: str
    silent_s: float  # since its last answer, or since it was asked
    timeout_s: float  # after which it is given up


class Watchdog:
    """Looks at all that is busy, in a thread of its own, until it is closed."""

    def __init__(self, watched: Sequence[Callable[[], list[Busy]]], say: Callable[[str], None]) -> None:
        self.watched = watched
        self.say = say
        self.said_s: dict[str, float] = {}  # by actor: the silence of which was told
        self.closed = Event()
        self.thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.closed.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        found = [each for find in self.watched for each in find()]
        found.sort(key=lambda each: -each.silent_s)
        busy = {each.actor: each for each in found}  # of several calls of an actor the one last heard of
        self.said_s = {actor: said_s for actor, said_s in self.said_s.items() if self._still(busy.get(actor), said_s)}
        for actor, each in busy.items():
            if each.silent_s >= 2 * self.said_s.get(actor, SHARE / 2 * each.timeout_s):
                self.said_s[actor] = each.silent_s
                limit = duration(each.timeout_s)
                self.say(f"{actor}: no answer for {duration(each.silent_s)} of at most {limit}; {each.doing}")

    @staticmethod
    def _still(each: Busy | None, said_s: float) -> bool:
        """Whether it has been silent ever since that was told."""
        return each is not None and each.silent_s >= said_s

    def close(self) -> None:
        self.closed.set()
        self.thread.join(LOOK_S)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
