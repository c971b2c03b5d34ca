"""What is said of actors that do not answer."""

from threading import Event

from c2f_ray.runtime.watchdog import Busy, Watchdog


def test_a_silence_is_told_at_a_quarter_of_the_deadline_and_each_time_it_has_doubled():
    said: list[str] = []
    busy: list[Busy] = []
    dog = Watchdog([lambda: busy], said.append)
    for silent_s in range(10, 610, 10):
        busy[:] = [Busy("rollout actor 3", "it owes 5 of 8 samples", silent_s, 480), Busy("learner rank 0", "", 1, 480)]
        dog.look()
    assert said == [
        "rollout actor 3: no answer for 0:02:00 of at most 0:08:00; it owes 5 of 8 samples",
        "rollout actor 3: no answer for 0:04:00 of at most 0:08:00; it owes 5 of 8 samples",
        "rollout actor 3: no answer for 0:08:00 of at most 0:08:00; it owes 5 of 8 samples",
    ]
    dog.close()


def test_who_answered_or_is_done_may_be_silent_anew():
    said: list[str] = []
    busy: list[Busy] = []
    dog = Watchdog([lambda: busy], said.append)
    for silences in ([130], [5], [110], [], [120], [150]):
        busy[:] = [Busy("a", "x", silent_s, 400) for silent_s in silences]
        dog.look()
    assert [line.split("; ")[0] for line in said] == [
        "a: no answer for 0:02:10 of at most 0:06:40",
        "a: no answer for 0:01:50 of at most 0:06:40",
        "a: no answer for 0:02:00 of at most 0:06:40",
    ]
    dog.close()


def test_an_actor_with_two_calls_is_as_silent_as_the_one_last_heard_of():
    said: list[str] = []
    dog = Watchdog([lambda: [Busy("a", "new", 90, 400), Busy("a", "old", 300, 400)]], said.append)
    dog.look()
    assert said == []
    dog.close()


def test_the_thread_looks_by_itself_and_ends(monkeypatch):
    monkeypatch.setattr("c2f_ray.runtime.watchdog.LOOK_S", 0.01)
    heard = Event()
    dog = Watchdog([lambda: [Busy("a", "x", 9, 10)]], lambda line: heard.set())
    assert heard.wait(30)
    dog.close()
    assert not dog.thread.is_alive()
