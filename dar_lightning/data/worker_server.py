"""What the server of the workers imports, and nobody else: all that they run, and how to outlive a job's signals."""

import os
import signal

from dar_lightning.data import image_dataset, token_dataset, views  # noqa: F401

STOPS = (signal.SIGTERM, signal.SIGUSR1)
for number in STOPS:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # `workers` blocks them until here
if os.environ.get("PYTHONSAFEPATH") == "dar":  # what workers start shall not have it
    del os.environ["PYTHONSAFEPATH"]
# other programs of the run may have processes of this server, too, and may want to end them
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
