"""The errors of c2f_ray: one family, each also the standard error that it resembles, all of them picklable."""

from signal import Signals


class C2FError(Exception):
    """Base of every error raised on purpose. Its text names the cause and the remedy."""


class RecipeError(C2FError, ValueError):
    """Bad input, found before any actor starts. The command line exits with code 2 and has written nothing.

    ``problems`` holds one line each: where (dotted key, or file and line), the value, the rule, the remedy.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class DeadlineError(C2FError, TimeoutError):
    """A wait reached its deadline. The text names what was awaited and for how long."""


class ActorDiedError(C2FError, RuntimeError):
    """An actor's process ended, or its model could not be loaded. The text names the actor and the cause."""


class StepLostError(C2FError):
    """What a step needs is gone; the run can go on from its newest checkpoint."""


class ShardsLostError(StepLostError):
    """A node that held trajectories is gone."""


class LearnerLostError(StepLostError, ActorDiedError, DeadlineError):
    """A learner rank's process ended, or did not answer in time. The text names the ranks."""


class WeightMismatchError(C2FError, RuntimeError):
    """An engine and the learner hold different weights after a transfer."""


class CheckpointError(C2FError, ValueError):
    """A checkpoint does not hold what the run needs. The text names the file or the parameter."""


class BadRewardError(C2FError, RuntimeError):
    """A reward was not finite. The text shows the response."""


class JudgeError(C2FError, RuntimeError):
    """The endpoint that judges answers did not answer. The text names it and what it said."""


class NonFiniteUpdateError(C2FError, ArithmeticError):
    """An update met infinity or NaN. The text names the quantity and the samples."""


class StoppedError(C2FError):
    """A signal stopped a command; a run left a checkpoint of its last whole step. The exit code is 128 + the signal."""

    def __init__(self, signal: Signals) -> None:
        super().__init__(signal)
        self.signal = signal

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}; run the same command again"
