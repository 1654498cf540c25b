"""The process that effnet is a guest in: what libraries change of its settings is put back.

To import one is enough: Lightning changes how every warning is written, NNCF draws from Python's random numbers, and
Ray replaces what tells errors and what breakpoint() starts.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CHANGING = threading.RLock()  # else a thread would keep, as the program's own, what another one's library has changed


@contextmanager
def unchanged() -> Iterator[None]:
    """Around the import or the start of a library: afterwards the program's settings are what they were.

    These are the environment, warnings, the classes of logging, what tells errors, and Python's random numbers.
    """
    with _CHANGING, warnings.catch_warnings():
        environment, drawn, form = dict(os.environ), random.getstate(), warnings.formatwarning
        hooks, tells_faults = (sys.excepthook, threading.excepthook), faulthandler.is_enabled()
        logger, record = logging.getLoggerClass(), logging.getLogRecordFactory()
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            random.setstate(drawn)
            warnings.formatwarning = form
            sys.excepthook, threading.excepthook = hooks
            if not tells_faults:
                faulthandler.disable()
            logging.setLoggerClass(logger)
            logging.setLogRecordFactory(record)


@contextmanager
def any_start_method() -> Iterator[None]:
    """Around processes of a start method that effnet chooses: the program may still choose its own afterwards.

    multiprocessing takes the default one as chosen where it starts a process by spawn or by forkserver.
    """
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        if before is None:
            multiprocessing.set_start_method(None, force=True)
