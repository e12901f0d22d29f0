"""What the server of killable has imported: its processes start with that, in no time."""

import atexit
import gc
import os

import pytest  # noqa: F401
import tiny_models  # noqa: F401

import dar_lightning.commands.extract
import dar_lightning.commands.fit  # noqa: F401

gc.freeze()  # neither the server nor its processes look through all of it for garbage, which would also copy it
atexit.register(os._exit, 0)  # which the server need not do at its end, either
