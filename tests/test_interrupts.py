import os
import signal
import threading
import time

import pytest

from optimum_eggs.interrupts import held_back


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # until Python has heard it


def hold_back(interrupts, reached):
    with held_back():
        for _ in range(interrupts):
            interrupt()
        reached.append("end")


@pytest.mark.parametrize(("interrupts", "reached"), [(1, ["end"]), (2, [])])
def test_the_first_is_raised_at_the_end_and_a_second_at_once(interrupts, reached):
    found = []
    with pytest.raises(KeyboardInterrupt):
        hold_back(interrupts, found)
    assert found == reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_takes_the_place_of_what_is_raised_within():
    def fails():
        with held_back():
            interrupt()
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as raised:
        fails()
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_is_raised_but_what_is():
    with held_back():
        pass
    with pytest.raises(ZeroDivisionError), held_back():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_stays(request):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with held_back():
        interrupt()
        assert heard == [1]


def test_other_threads_are_let_be():
    done = []

    def work():
        with held_back():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
