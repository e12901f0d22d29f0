"""A child process to which this process's signals are passed on."""

import signal
import subprocess
from typing import Any

# A training saves at the first three: StopOnSignal. At the others, a closed terminal's and Ctrl+\, it ends.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def call(words: list[str], **options: Any) -> tuple[int, int]:
    """Run a command to its end; a signal that asks this process to stop is passed on to it.

    Returns its exit status, and the signal's number, 0 for none. `options` are those of subprocess.Popen.
    """
    received, child, early = 0, None, []

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        received = number
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        # In a process group of its own: a terminal's Ctrl+C would reach it twice, and a second one interrupts at once.
        child = subprocess.Popen(words, process_group=0, **options)
        for number in early:
            child.send_signal(number)
        return child.wait(), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
