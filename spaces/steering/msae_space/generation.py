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
from msae_space.loaded_sae import LoadedSAE
from msae_space.reading import continuation_loss
from msae_space.zerogpu import on_gpu

PANES = ("default", "steered")


@dataclass
class Texts:
    """What has been generated so far, without the prompt.

    Args:
        default: The unsteered text.
        steered: The steered text.
        done: Whether that is all.
        losses: When it is, the unsteered model's loss on each text, in nats per token; None for an empty one.
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
    """Collects the tokens of one text, and says when there are more; a streamer of transformers."""

    name: str
    news: "queue.SimpleQueue[tuple[str, BaseException | None]]"
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then each new token."""
        if not self.prompt:  # `generate` begins with it
            self.prompt = value.flatten().tolist()
            return
        self.ids.extend(value.flatten().tolist())
        self.news.put((self.name, None))

    def end(self) -> None:
        """Does nothing: the thread says when its text has ended."""


def stream(
    loaded: LoadedSAE,
    prompt: str,
    steering: Steering,
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    stopped: threading.Event | None = None,
) -> Iterator[Texts]:
    """Writes the default and the steered text at once, in a thread each. What a thread raises is raised here.

    Args:
        loaded: The SAE and its language model.
        prompt: What both begin with.
        steering: What is done to one of them.
        seed: Of the randomness that both share.
        temperature: Of the sampling; 0 takes the likeliest token.
        max_new_tokens: Of each text.
        stopped: When set, the texts end where they are.

    Yields:
        The texts as they grow, the whole of them at last.
    """
    stopped = stopped or threading.Event()
    news: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
    pipe = SteeredPipeline(loaded.model, loaded.tokenizer, loaded.sae, steering)
    pipes = {"default": pipe.with_steering(Steering()), "steered": pipe}
    panes = {name: _Pane(name, news) for name in PANES}

    def write(name: str) -> None:
        failure: BaseException | None = None
        try:
            pipes[name](
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
                yield _texts(loaded, panes)
        texts = _texts(loaded, panes)
        losses = {name: continuation_loss(loaded, prompt, getattr(texts, name)) for name in PANES}
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


def _texts(loaded: LoadedSAE, panes: dict[str, _Pane]) -> Texts:
    return Texts(_text(loaded, panes["default"]), _text(loaded, panes["steered"]))


def _text(loaded: LoadedSAE, pane: _Pane) -> str:
    """What follows the prompt. Decoded with it, because many tokenizers drop the space before the first token."""
    before = loaded.decode(pane.prompt, skip_special=True)
    whole = loaded.decode([*pane.prompt, *pane.ids], skip_special=True)
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
