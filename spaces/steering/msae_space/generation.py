"""Two texts at once, one of them steered, with the same randomness: what differs between them is the steering's doing.

Each text is generated in a thread of its own, whose steering no other thread sees (`hf_msae.steering.context`). The
page reads along; whoever stops reading stops the threads.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_msae.steering import SteeredPipeline, Steering
from msae_space.reading import surprise
from msae_space.workbench import Workbench
from msae_space.zerogpu import on_gpu

PANES = ("default", "steered")


@dataclass
class Texts:
    """What has been generated so far (without the prompt), and whether that is all; then also by how many nats per
    token each text surprises the unsteered model (None for an empty one).
    """

    default: str = ""
    steered: str = ""
    done: bool = False
    losses: dict[str, float | None] = field(default_factory=dict)


class _Stop(StoppingCriteria):
    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> bool:
        return self.stopped.is_set()


@dataclass
class _Pane(BaseStreamer):
    """Collects the tokens of one text, and says when there are more."""

    name: str
    news: "queue.SimpleQueue[tuple[str, BaseException | None]]"
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        if not self.prompt:  # `generate` begins with it
            self.prompt = value.flatten().tolist()
            return
        self.ids.extend(value.flatten().tolist())
        self.news.put((self.name, None))

    def end(self) -> None:
        pass


def stream(
    bench: Workbench,
    prompt: str,
    steering: Steering,
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    stopped: threading.Event | None = None,
) -> Iterator[Texts]:
    """The texts as they grow, the whole of them at last. Raises what the threads raise.

    stopped: when set, the texts end where they are.
    """
    stopped = stopped or threading.Event()
    news: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
    pipe = SteeredPipeline(bench.model, bench.tokenizer, bench.sae, steering)
    panes = {name: _Pane(name, news) for name in PANES}

    def write(name: str) -> None:
        chosen = pipe if name == "steered" else pipe.with_steering(Steering())
        failure: BaseException | None = None
        try:
            chosen(
                prompt,
                seed=seed,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                streamer=panes[name],
                stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
            )
        except BaseException as error:
            failure = error
        news.put(("end", failure))

    threads = [threading.Thread(target=write, args=(name,), daemon=True) for name in PANES]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            running -= _take(news)
            if running:
                yield _texts(bench, panes)
        texts = _texts(bench, panes)
        losses = {name: surprise(bench, prompt, getattr(texts, name)) for name in PANES}
        yield replace(texts, done=True, losses=losses)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


lent_stream = on_gpu(stream)


def _take(news: "queue.SimpleQueue[tuple[str, BaseException | None]]") -> int:
    """Wait for news and take all that there is; the number of texts that have ended."""
    ended, what = 0, [news.get()]
    while not news.empty():
        what.append(news.get())
    for name, failure in what:
        if failure is not None:
            raise failure
        ended += name == "end"
    return ended


def _texts(bench: Workbench, panes: dict[str, _Pane]) -> Texts:
    return Texts(_text(bench, panes["default"]), _text(bench, panes["steered"]))


def _text(bench: Workbench, pane: _Pane) -> str:
    """What follows the prompt. Decoded with it, because many tokenizers drop the space before the first token."""
    before = bench.decode(pane.prompt, skip_special=True)
    whole = bench.decode([*pane.prompt, *pane.ids], skip_special=True)
    # A token may end inside a letter of several bytes, which then reads as this sign until the rest has come.
    return whole[len(before) :].rstrip("\N{REPLACEMENT CHARACTER}")


class Runs:
    """Which run each visitor has going, so that their Stop button, a new run or their leaving ends it."""

    def __init__(self) -> None:
        self._going: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str) -> threading.Event:
        """Ends the visitor's run and begins another."""
        with self._lock:
            if visitor in self._going:
                self._going[visitor].set()
            self._going[visitor] = threading.Event()
            return self._going[visitor]

    def is_superseded(self, visitor: str, run: threading.Event) -> bool:
        """Whether the visitor has begun another run since."""
        with self._lock:
            return self._going.get(visitor, run) is not run

    def stop(self, visitor: str) -> None:
        """Ends the visitor's run, if there is one."""
        with self._lock:
            if visitor in self._going:
                self._going.pop(visitor).set()

    def end(self, visitor: str, run: threading.Event) -> None:
        """Forgets a run that has ended by itself."""
        with self._lock:
            if self._going.get(visitor) is run:
                del self._going[visitor]
