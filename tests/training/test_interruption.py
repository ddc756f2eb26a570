import os
import signal
import threading

import pytest

from crossattention.training.interruption import Interruption


def kill(number):
    os.kill(os.getpid(), number)


def test_the_first_signal_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.signal_number == 0
        kill(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        interruption.answer(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            kill(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_sigterm_that_comes_again_says_nothing_new():
    with Interruption() as interruption:
        for _ in range(3):
            kill(signal.SIGTERM)
        assert interruption.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            kill(signal.SIGINT)


def test_a_sigint_that_a_launcher_hands_on_is_the_same_and_a_later_one_is_not(monkeypatch):
    from crossattention.training import interruption as module

    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Interruption(has_launcher=True) as interruption:
        kill(signal.SIGINT)
        clock[0] += 0.5
        kill(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            kill(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_inside_at_once_the_first_signal_raises(number):
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            kill(number)
        assert interruption.signal_number == number
        interruption.answer(number)


def test_a_signal_from_before_raises_at_the_beginning_of_at_once():
    with Interruption() as interruption:
        kill(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            raise AssertionError("not reached")
        interruption.answer(signal.SIGTERM)


def test_the_answers_are_the_usual_ones():
    assert isinstance(Interruption().answer(signal.SIGINT), KeyboardInterrupt)
    answer = Interruption().answer(signal.SIGTERM)
    assert isinstance(answer, SystemExit)
    assert answer.code == 143


def test_a_signal_that_nobody_answered_is_handed_on():
    with pytest.raises(KeyboardInterrupt), Interruption():
        kill(signal.SIGINT)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            kill(signal.SIGINT)
            assert interruption.signal_number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
