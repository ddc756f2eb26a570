"""Evaluations that several processes share: threads in the place of processes."""

import threading
from contextlib import contextmanager

import pytest

from crossattention.training.interruption import Interruption
from crossattention.training.together import ALONE, BrokenOffError, Together


class Meeting:
    """Collective calls of threads: each brings a value, all get all. Whoever waits alone fails."""

    def __init__(self, count):
        self.barrier, self.values = threading.Barrier(count, timeout=5), [None] * count

    def gather_of(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            told = list(self.values)
            self.barrier.wait()
            return told

        return gather


def in_threads(count, work):
    meeting, found = Meeting(count), [None] * count

    def run(rank):
        try:
            found[rank] = work(Together(rank, count, meeting.gather_of(rank)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_all_get_all_answers_in_order_and_each_item_is_answered_once(count, items):
    answered = []

    def work(together):
        found = together.map(lambda item: (answered.append(item), item**2)[1], range(items))
        together.finish()
        return found

    assert in_threads(count, work) == [[item**2 for item in range(items)]] * count
    assert sorted(answered) == list(range(items))


def test_one_that_breaks_off_ends_the_evaluation_of_all_whatever_they_are_at():
    for stops_at in (1, 2, 3):

        def work(together, stops_at=stops_at):
            try:
                for place in (1, 2):
                    if together.rank == 1 and place == stops_at:
                        raise ValueError(f"at {place}")
                    together.map(str, range(3))
                if together.rank == 1 and stops_at == 3:
                    raise ValueError("at 3")
                together.finish()
            except ValueError as error:
                together.break_off(str(error))
                return "stopped"

        first, second, third = in_threads(3, work)
        assert second == "stopped"
        assert isinstance(first, BrokenOffError) and first.fault == third.fault == f"at {stops_at}"


def test_all_that_break_off_at_once_wait_for_nobody():
    def work(together):
        together.break_off()
        together.break_off()
        return "stopped"

    assert in_threads(2, work) == ["stopped"] * 2


def test_other_items_in_another_process_are_told():
    found = in_threads(2, lambda together: together.map(str, range(2 + together.rank)))
    assert all("must score the same items, got [2, 3]" in str(error) for error in found)


def test_a_signal_does_not_cut_a_collective_call_and_raises_after_it():
    interruption, seen = Interruption(), []

    @contextmanager
    def unbroken():
        with interruption.noted():
            yield

    def gather(value):
        if not seen:
            interruption._note(15, None)  # arrives in the middle
        seen.append(value)
        return [value, value]

    together = Together(0, 2, gather, unbroken)
    with pytest.raises(KeyboardInterrupt), interruption.at_once():
        together.map(str, [1])
    assert len(seen) == 1
    together.break_off()  # the others do not know yet
    assert seen[1][0] == ""


def test_one_alone_tells_nobody():
    assert ALONE.is_first and ALONE.map(str, [1, 2]) == ["1", "2"]
    ALONE.finish()
    ALONE.break_off("nobody hears")
