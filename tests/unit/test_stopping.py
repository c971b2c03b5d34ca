"""A signal ends a run at once, or when what cannot be taken back is done."""

import os
import pickle
import signal
import threading
import time

import pytest

from c2f_ray.errors import StoppedError
from c2f_ray.stopping import Stopping


def test_at_once_when_nothing_is_held():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as stopped, Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert 128 + stopped.value.signal == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert pickle.loads(pickle.dumps(stopped.value)).signal == signal.SIGTERM


def test_what_is_held_is_finished_first():
    done = []
    with pytest.raises(StoppedError), Stopping() as stopping:
        stopping.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("update")
        stopping.release()
        done.append("next step")
    assert done == ["update"]


def test_a_second_term_does_not_disturb_the_last_checkpoint_and_a_second_ctrl_c_does():
    done = []
    with pytest.raises(StoppedError) as stopped, Stopping():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("half of the checkpoint")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
    assert done == ["half of the checkpoint"]
    assert stopped.value.signal == signal.SIGINT


def test_other_errors_and_calm_runs_pass_through():
    with pytest.raises(ValueError, match="its own"), Stopping() as stopping:
        stopping.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("its own")
    with Stopping() as stopping:
        stopping.hold()
        stopping.release()


def test_in_another_thread_signals_are_left_alone():
    found = []

    def run() -> None:
        with Stopping():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == [signal.getsignal(signal.SIGTERM)]
