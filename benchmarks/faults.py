"""What becomes of a run that is hurt: real processes, faults at random moments, and the result bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --kills 50 --seed 0 --json faults.json

A small run (a random Llama of two layers on random text, 60 steps, a checkpoint every 4) is first left in peace. Then
it is run again and again, hurt at a moment drawn from the seed, and resumed until it is done; half of the runs train
two SAEs. What it leaves must be what the undisturbed run left: every weight, threshold and statistic, and the measured
numbers. The faults:

- kill: SIGKILL.
- term: SIGTERM; the run must save, and exit with 143.
- full disk: files cannot grow beyond some bytes from a moment on (RLIMIT_FSIZE, set from outside), for a while, or
  until the run gives up at its end.
- corrupt: SIGKILL, and then a file of the newest checkpoint is truncated, removed, or has a bit turned over.
- stream: the dataset is a stream that breaks, once or so often that the run gives up.
- rank: one of two processes gets SIGKILL; the other must end by itself.

Every process is a fork of this one, which has imported everything: a process that starts from nothing needs seconds to
import torch.
"""

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import IterableDataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_msae.cli.train
from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main as run_command
from hf_msae.data import DatasetError, Documents
from hf_msae.data.sources import StreamSource
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.checkpoints import list_checkpoints

assert hf_msae.cli.train  # imported here, so that no fork has to

STEPS, SAVE_STEPS = 60, 4
MAX_ATTEMPTS = 12
# Longer than any run here takes; a process that is still there then hangs.
PATIENCE_S = 3600.0
ARGUMENTS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "per_device_train_batch_size": 64,
    "block_tokens": 600,
    "eval_tokens": 400,
    "calibration_tokens": 200,
    "ce_tokens": 200,
    "context_length": 32,
    "logging_steps": 1,
    "save_total_limit": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "ddp_timeout": 600,
}
SHAPE = {"hidden_size": 16, "num_latents": 256, "prefix_sizes": [16, 64, 256]}


# The run


class World:
    """The model, the text and the folders of all runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "lm")
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
        config = LlamaConfig(vocab_size=80, hidden_size=16, intermediate_size=24, **shape)
        LlamaForCausalLM(config).save_pretrained(folder / "lm")
        draw = random.Random(7)
        self.texts = [" ".join(f"w{draw.randrange(60)}" for _ in range(draw.randint(1, 40))) for _ in range(600)]
        (folder / "texts.txt").write_text("\n\n".join(self.texts), encoding="utf-8")

    def command(self, output: Path, ks: Sequence[int], *more: str) -> list[str]:
        """The run as a user types it."""
        flags = ["train", "--model", str(self.folder / "lm"), "--dataset", str(self.folder / "texts.txt")]
        flags += ["--site", "layers.0", "--num-latents", "256", "--prefix-sizes", "16", "64", "256", "--k"]
        flags += [*map(str, ks), "--output-dir", str(output)]
        for name, value in ARGUMENTS.items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return [*flags, *more]

    def stream(self, output: Path, breaks: dict[int, int], resume: bool) -> None:
        """The run on a dataset that is streamed, and breaks `breaks[i]` times at row i."""

        def rows() -> Any:
            for index, text in enumerate(self.texts):
                if breaks.get(index, 0) > 0:
                    breaks[index] -= 1
                    raise ConnectionResetError(f"broken at row {index}")
                yield {"text": text}

        source = StreamSource(IterableDataset.from_generator(rows), retry_waits=(0.01, 0.02, 0.04))
        documents = Documents(source, column="text", description="a stream")
        model = LlamaForCausalLM.from_pretrained(self.folder / "lm").eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / "lm")
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**SHAPE, k=4, site="layers.0"))
        more = {"resume_from_checkpoint": "last"} if resume else {"overwrite_output_dir": True}
        args = SAETrainingArguments(output_dir=str(output), **ARGUMENTS, **more)
        SAETrainer(model, sae, args, documents, processing_class=tokenizer).train()


class Process:
    """A fork of this process that does something, and writes what it says to a file."""

    def __init__(self, log: Path, work: Callable[[], None], **environment: str) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(log, work, environment)

    @staticmethod
    def _live(log: Path, work: Callable[[], None], environment: dict[str, str]) -> None:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # whatever stood in for them before the fork
            logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
            os.environ |= environment
            PartialState._reset_state()  # whatever group the forked process was in
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = PATIENCE_S) -> int:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise RuntimeError(f"a process did not end within {seconds:.0f} s")
            time.sleep(0.005)
        return int(self.code or 0)

    def send(self, number: int) -> bool:
        """Whether it was still there to get the signal."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True


# Trials


@dataclass
class Trial:
    """One run that was hurt: how often, how, and what became of it."""

    fault: str
    grid: bool
    faults: int = 0
    resumed: int = 0
    begun_anew: int = 0
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    same: bool = False


class Bench:
    """Runs trials; `whole` are the results of the undisturbed runs by kind."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.draw = world, random.Random(seed)
        self.whole: dict[str, tuple[Path, float]] = {}
        self.count = 0

    def reference(self, kind: str) -> tuple[Path, float]:
        """The folder of the undisturbed run of a kind, and the seconds that it took."""
        if kind not in self.whole:
            output, began = self.world.folder / f"whole-{kind}", time.monotonic()
            codes = [process.wait() for process in self.start(kind, output, resume=False)]
            if any(codes):
                raise RuntimeError(
                    f"the undisturbed run failed: {self._log(output).read_text(encoding='utf-8')[-2000:]}"
                )
            self.whole[kind] = (output, time.monotonic() - began)
        return self.whole[kind]

    def start(self, kind: str, output: Path, resume: bool, breaks: dict[int, int] | None = None) -> list[Process]:
        """Begin a run, or go on with it: one process, or two."""
        if kind == "stream":
            return [Process(self._log(output), lambda: self.world.stream(output, breaks or {}, resume))]
        more = ["--resume-from-checkpoint"] if resume else ["--overwrite-output-dir"]
        if kind == "two":
            more += ["--per-device-train-batch-size", "32"]
        command = self.world.command(output, (4, 2) if kind == "grid" else (4,), *more)
        work = lambda: run_command(command)  # noqa: E731
        if kind != "two":
            return [Process(self._log(output), work)]
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [Process(self._log(output), work, **environment) for environment in ranks]

    def _log(self, output: Path) -> Path:
        return output.with_name(output.name + ".log")

    def said(self, output: Path) -> str:
        """What the processes of a run said."""
        return self._log(output).read_text(encoding="utf-8") if self._log(output).is_file() else ""

    def try_fault(self, fault: str) -> Trial:
        """Hurt one run once, resume it until it is done, and compare."""
        self.count += 1
        kind = {"stream": "stream", "rank": "two"}.get(fault) or self.draw.choice(["single", "grid"])
        trial = Trial(fault, grid=kind == "grid")
        whole, seconds = self.reference(kind)
        output = self.world.folder / f"{self.count}-{fault.replace(' ', '-')}"
        try:
            for _ in range(MAX_ATTEMPTS):
                hurt = trial.faults == 0
                resume = bool(list_checkpoints(output))
                trial.resumed += resume
                trial.begun_anew += not hurt and not resume
                if not hurt:
                    codes = [process.wait() for process in self.start(kind, output, resume)]
                elif fault == "stream":
                    codes = self._break_stream(trial, output, resume)
                else:
                    codes = FAULTS[fault](self, trial, kind, output, resume, seconds)
                if not any(codes):
                    trial.finished = True
                    break
        except RuntimeError as error:
            trial.notes.append(str(error))
        trial.same = trial.finished and not differences(whole, output)
        if trial.same:
            shutil.rmtree(output)
        return trial

    def _moment(self, process: Process, output: Path, seconds: float) -> bool:
        """Wait until a random moment of the run, at its beginning or some while after a random step; whether the
        process is still there.
        """
        step, extra = self.draw.randrange(STEPS), self.draw.uniform(0, 0.1) * seconds
        log = output / "training_log.jsonl"
        while process.poll() is None and not (
            step == 0 or (log.exists() and f'"step": {step},' in log.read_text(encoding="utf-8"))
        ):
            time.sleep(0.002)
        time.sleep(extra)
        return process.poll() is None

    def _kill(self, trial: Trial, kind: str, output: Path, resume: bool, seconds: float) -> list[int]:
        (process,) = self.start(kind, output, resume)
        self._moment(process, output, seconds)
        trial.faults += process.send(signal.SIGKILL)
        return [process.wait()]

    def _term(self, trial: Trial, kind: str, output: Path, resume: bool, seconds: float) -> list[int]:
        (process,) = self.start(kind, output, resume)
        self._moment(process, output, seconds)
        trial.faults += process.send(signal.SIGTERM)
        code = process.wait()
        # Before and after the steps there is nothing to save, and the signal ends the process as any other.
        if code not in (0, 143, -signal.SIGTERM):
            raise RuntimeError(f"SIGTERM ended the run with {code}")
        if code == 143:
            trial.notes.append("saved")
            if "saved" not in self.said(output):
                raise RuntimeError("the run exited with 143 but did not say that it saved")
        return [code]

    def _fill_disk(self, trial: Trial, kind: str, output: Path, resume: bool, seconds: float) -> list[int]:
        (process,) = self.start(kind, output, resume)
        if self._moment(process, output, seconds):
            trial.faults += 1
            unlimited = resource.RLIM_INFINITY
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (self.draw.randint(100, 20_000), unlimited))
            if self.draw.random() < 0.5:
                time.sleep(self.draw.uniform(0, 0.5) * seconds)
                if process.poll() is None:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        code = process.wait()
        if code == 2 and "is full" not in self.said(output):
            raise RuntimeError(f"the full disk is not named: {self.said(output)[-500:]}")
        trial.notes.append("went on" if code == 0 else "gave up at the end")
        return [code]

    def _corrupt(self, trial: Trial, kind: str, output: Path, resume: bool, seconds: float) -> list[int]:
        codes = self._kill(trial, kind, output, resume, seconds)
        checkpoints = list_checkpoints(output)
        if not checkpoints or not any(codes):
            return codes
        path = self.draw.choice(sorted(path for path in checkpoints[-1].rglob("*") if path.is_file()))
        way = self.draw.choice(["truncated", "removed", "bit turned"])
        trial.notes.append(f"{path.name} {way}")
        damage(path, way, self.draw)
        if len(checkpoints) > 1:
            return codes
        # Nothing is left to resume from, unless what was removed is what made it a checkpoint: that must be said.
        if list_checkpoints(output) and self.start(kind, output, True)[0].wait() == 0:
            raise RuntimeError("a run resumed from a damaged checkpoint")
        shutil.rmtree(output)
        return codes

    def _break_stream(self, trial: Trial, output: Path, resume: bool) -> list[int]:
        row, often = self.draw.randrange(120, 500), self.draw.choice([1, 2, 4])
        trial.faults += 1
        code = self.start("stream", output, resume, {row: often})[0].wait()
        trial.notes.append("read again" if code == 0 else "gave up, saved")
        if code and DatasetError.__name__ not in self.said(output):
            raise RuntimeError(f"the broken stream is not named: {self.said(output)[-500:]}")
        return [code]

    def _kill_rank(self, trial: Trial, kind: str, output: Path, resume: bool, seconds: float) -> list[int]:
        processes = self.start(kind, output, resume)
        victim = self.draw.randrange(2)
        self._moment(processes[victim], output, seconds)
        trial.faults += processes[victim].send(signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait() for process in processes]
        trial.notes.append(f"the other ended after {time.monotonic() - began:.1f} s")
        return codes


FAULTS: dict[str, Callable[..., list[int]]] = {
    "kill": Bench._kill,
    "term": Bench._term,
    "full disk": Bench._fill_disk,
    "corrupt": Bench._corrupt,
    "stream": Bench._break_stream,
    "rank": Bench._kill_rank,
}


def damage(path: Path, way: str, draw: random.Random) -> None:
    """Truncate or remove a file, or turn over one of its bits."""
    if way == "removed":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if way == "truncated":
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def differences(whole: Path, other: Path) -> list[str]:
    """Tensors and measured numbers in which two results differ."""
    found = []
    for path in sorted(whole.rglob("model.safetensors")):
        name = path.relative_to(whole)
        if "checkpoint-" in str(name):
            continue
        if not (other / name).is_file():
            return [f"{name} is missing"]
        ours, theirs = load_file(path), load_file(other / name)
        found += [f"{name}: {key}" for key in ours if not torch.equal(ours[key], theirs[key])]
        numbers = [
            json.loads((folder / name).with_name("metrics.json").read_text(encoding="utf-8"))
            for folder in (whole, other)
        ]
        found += [f"{name}: {key}" for key in ("levels", "tokens", "steps") if numbers[0][key] != numbers[1][key]]
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# Report


def summarise(trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """Numbers by fault."""
    table: dict[str, dict[str, int]] = {}
    for fault in dict.fromkeys(trial.fault for trial in trials):
        some = [trial for trial in trials if trial.fault == fault]
        table[fault] = {
            "runs": len(some),
            "faults": sum(trial.faults for trial in some),
            "grids": sum(trial.grid for trial in some),
            "resumed": sum(trial.resumed for trial in some),
            "begun anew": sum(trial.begun_anew for trial in some),
            "lost": sum(not trial.finished for trial in some),
            "changed": sum(trial.finished and not trial.same for trial in some),
        }
    table["all"] = {key: sum(row[key] for row in table.values()) for key in next(iter(table.values()))}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="faults over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--json", help="write the table and every run, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="hf-msae-faults-") as folder:
        bench = Bench(World(Path(folder)), options.seed)
        while sum(trial.faults for trial in trials) < options.kills:
            trials.append(bench.try_fault(options.only[len(trials) % len(options.only)]))
            last = trials[-1]
            state = "same" if last.same else "CHANGED" if last.finished else "LOST"
            print(f"{len(trials):3} {last.fault:10} {state:8} {'; '.join(last.notes)}", flush=True)
    table = summarise(trials)
    columns = list(table["all"])
    print(f"\n{'':10}" + "".join(f"{column:>12}" for column in columns))
    for fault, row in table.items():
        print(f"{fault:10}" + "".join(f"{row[column]:12}" for column in columns))
    if options.json:
        result = {"seed": options.seed, "table": table, "runs": [asdict(trial) for trial in trials]}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if table["all"]["lost"] or table["all"]["changed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
