"""Pushing a run: its checkpoints while it goes on, and its result, to one repo on the Hub.

Whatever goes wrong with the Hub, the run goes on and its result lies in its folder. The repo and the token are checked
before training begins, because that is when somebody is watching. Checkpoints are pushed in a thread, one at a time:
where the network is slower than the training, those that come while one is on its way are left out, and the result is
pushed at the end all the same.
"""

import logging
import os
import shutil
import threading
from pathlib import Path

from hf_msae.hub.publishing import prepare_repo, push_folder
from hf_msae.training.checkpoints import STATE_NAME
from hf_msae.training.run import Run

logger = logging.getLogger(__name__)

# Made of links, so that rotation cannot remove a checkpoint that is on its way.
SNAPSHOT_NAME = ".pushing.part"
# What only a resumed run needs.
NOT_PUSHED = (STATE_NAME, "learner*")


class Pusher:
    """Pushes a run to a repo, which is made if it is not there; the main process pushes.

    Args:
        run: The run.

    Raises:
        PublishError: At once for what cannot work: no token, one that may not write, a bad id, a repo that holds
            something else, a Hub that cannot be reached.
    """

    def __init__(self, run: Run) -> None:
        args = run.args
        self.run, self.strategy = run, args.hub_strategy
        self._token, self._private = args.hub_token, args.hub_private_repo or None
        name = args.hub_model_id or run.output_dir.resolve().name
        self.repo_id = run.on_main(lambda: prepare_repo(name, self._private, self._token))
        self._thread: threading.Thread | None = None

    def push_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Begin to push the SAEs of a checkpoint, where that was asked for and none is on its way.

        Args:
            checkpoint: Its folder.
            step: Its step.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if self.strategy != "every_save" or busy or not self.run.is_main:
            return
        snapshot = self.run.output_dir / SNAPSHOT_NAME
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            shutil.copytree(checkpoint, snapshot, ignore=shutil.ignore_patterns(*NOT_PUSHED), copy_function=_link)
        except (OSError, shutil.Error) as error:
            logger.warning("Step %d is not pushed to %s: %s", step, self.repo_id, error)
            return
        # A daemon, so that a run that was told to stop does not wait for the network. A commit is whole or absent.
        self._thread = threading.Thread(target=self._push_snapshot, args=(snapshot, step), daemon=True)
        self._thread.start()

    def _push_snapshot(self, snapshot: Path, step: int) -> None:
        self._push(snapshot, f"Step {step}", f"The SAEs of step {step}", self.run.output_dir / f"checkpoint-{step}")
        shutil.rmtree(snapshot, ignore_errors=True)

    def push_result(self) -> None:
        """Push what the run left in its folder."""
        if not self.run.is_main:
            return
        if self._thread is not None:
            self._thread.join()
        url = self._push(self.run.output_dir, "End of training", "The result", self.run.output_dir)
        if url is not None:
            logger.info("Pushed the result to %s", url)

    def _push(self, folder: Path, title: str, what: str, by_hand: Path) -> str | None:
        try:
            return push_folder(folder, self.repo_id, private=self._private, commit_message=title, token=self._token)
        except Exception as error:  # the one place where any error at all is better told than raised
            logger.warning(
                "%s did not reach %s: %s To push it by hand: hf-msae push %s %s",
                what,
                self.repo_id,
                error,
                by_hand,
                self.repo_id,
            )
            return None


def _link(source: str, target: str) -> str:
    """A second name for the same file; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
