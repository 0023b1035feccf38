"""Settings that torch, transformers, datasets and Python keep once for the whole process, though threads share it.

Each is held through here, or by a `SharedSetting` beside what it sets, so that two threads give what each gives alone.
Those that any number of threads may want at once are counted: the first one in sets them and the last one out puts
back what was there, in whatever order they leave. Forward-mode differentiation and the making of models have one place
only, so there they wait for one another.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.utils import logging as transformers_logging

_FORWARD_MODE = threading.RLock()
# Held while transformers makes a model. Meanwhile it sets torch's default precision, keeps weights from being tied and
# takes functions of torch's for its own, all for the process, and puts back what was there when it began: a model that
# another thread makes at the same time may come out untied, in another precision or without numbers, and what was put
# back last stays.
loading = threading.RLock()


class SharedSetting:
    """A setting that is in force while anybody holds it: `with setting(): ...`.

    change: makes the context manager that sets it and puts back what was there.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change, self._lock = change, threading.Lock()
        self._num_holders, self._in_force = 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Keep the setting in force while the context is open."""
        with self._lock:
            if not self._num_holders:
                self._in_force.enter_context(self._change())
            self._num_holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if not self._num_holders:
                    self._in_force.close()


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level of `torch.autograd.forward_ad`; other threads wait until it is left, because torch has but one."""
    with _FORWARD_MODE, forward_ad.dual_level():
        yield


@contextmanager
def _without_transformers_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _without_datasets_bars() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _without_data_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        yield


# Every compiled function runs as it was written. Torch compiles a model without a look at hooks that come later
# (`torch._dynamo.config.skip_nnmodule_hook_guards`), so where hooks are to act, nothing compiled may run. Other
# threads' compiled models run uncompiled meanwhile, and give the same up to rounding.
eager = SharedSetting(lambda: torch.compiler.set_stance("force_eager"))
# Bars that would tear the caller's own apart.
no_transformers_bars = SharedSetting(_without_transformers_bars)
no_datasets_bars = SharedSetting(_without_datasets_bars)
# The Hub's client warns of data beside a model, which is as it should be where an interpretation is pushed.
no_data_warning = SharedSetting(_without_data_warning)
