"""Threads that write, and the line in front of them.

A job keeps its place from when it is taken until its thread is done with it; whoever gives it up gives its place to
the next one, whether it was still waiting or already running.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hf_msae.serving.asking import Asked
from hf_msae.serving.limits import Limits, RequestError
from hf_msae.serving.writing import News, write

# How long it may take until somebody is noticed to have left while nothing is being written.
LOOK_AFTER_SECONDS = 0.5


class Job:
    """A request that waits or is being written; `follow` gives its news to the event loop that made it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.stopped = threading.Event()
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News | BaseException | None] = asyncio.Queue()

    def run(self) -> None:
        """Write, in the thread that calls it."""
        failure: BaseException | None = None
        try:
            write(self.asked, self._tell, self.stopped)
        except BaseException as error:
            failure = error
        self._tell(failure)

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self.stopped.set()
        if self.future is not None:
            self.future.cancel()

    async def follow(self, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[News]:
        """The news as they come; what the thread raises is raised here.

        Args:
            is_gone: Whether whoever asked has left; then this ends early.

        Yields:
            Each piece of a text and each end.
        """
        waiting: asyncio.Task[News | BaseException | None] | None = None
        try:
            while not await is_gone():
                waiting = waiting or asyncio.ensure_future(self._news.get())
                await asyncio.wait({waiting}, timeout=LOOK_AFTER_SECONDS)
                if not waiting.done():
                    continue
                news, waiting = waiting.result(), None
                if news is None:
                    return
                if isinstance(news, BaseException):
                    raise news
                yield news
        finally:
            self.give_up()
            if waiting is not None:
                waiting.cancel()

    def _tell(self, news: News | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class Desk:
    """Takes requests, as many at once as the limits say."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._threads = ThreadPoolExecutor(limits.max_running, thread_name_prefix="hf-msae-serve")
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()

    @property
    def num_taken(self) -> int:
        """How many requests are being written or wait."""
        return len(self._jobs)

    def take(self, asked: Asked) -> Job:
        """Begin to write a request, as soon as a thread is free.

        Raises:
            RequestError: Too many wait already.
        """
        job = Job(asked)
        with self._lock:
            if len(self._jobs) >= self.limits.max_running + self.limits.max_waiting:
                raise RequestError(
                    f"{len(self._jobs)} requests are being answered or wait, and no more may; try again later.",
                    status=429,
                    code="rate_limit_exceeded",
                )
            self._jobs.add(job)
        job.future = self._threads.submit(job.run)
        job.future.add_done_callback(lambda _: self._leave(job))
        return job

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def close(self) -> None:
        """Give up all requests."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.give_up()
        self._threads.shutdown(wait=False, cancel_futures=True)
