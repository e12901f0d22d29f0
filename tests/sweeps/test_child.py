"""A signal that is ignored. Those that are passed on: the tests of `dar sweep` and `dar quickstart` send them."""

import signal
import sys

from dar_lightning.sweeps.child import call

HANG_UP = "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); "
IGNORED = HANG_UP + "os.kill(os.getpid(), signal.SIGHUP)"
PASSED_ON = HANG_UP + "time.sleep(60)"


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert call([sys.executable, "-c", IGNORED]) == (0, 0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert call([sys.executable, "-c", PASSED_ON]) == (-signal.SIGHUP, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
