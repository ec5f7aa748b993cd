"""The steps of the notebooks for Kaggle and Colab; `Session` has a method for each.

    install     install the packages, keep the platform's torch where it is recent enough, and try the GPU
    take_over   copy what the session before has left in its output, which is read-only now (Kaggle)
    prepare     corpus -> tokenizer -> shards, unless they are there
    train       train until the run is done, or until shortly before the platform ends the session

A notebook imports this file from a clone of the repository, before the project's packages are installed, so it needs
only `packaging`, which every Jupyter platform has. All work is done by `python -m job` in processes of their own.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from job.errors import EXIT_DONE, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED, UserError
from launch.notebook_files import (
    SHARDS,
    TOKENIZER,
    TRACKER,
    copy_folder,
    find_markers,
    find_session,
    folder_bytes,
    merge_folder,
    write_session,
)
from launch.notebook_packages import TORCH_COMPANIONS, choose_packages, installed_torch

REPOSITORY = Path(__file__).parent.parent
KEEP = 2
"""Checkpoints that are kept: a damaged one must not lose the run, and the output of a session is limited."""
MARGIN_SECONDS = 1800
"""Time between the end of training and the end of the session, in which the platform stores the files."""
_STARTS = 3
"""Most starts of the training in a session, if it crashes."""
_SHORTEST_SECONDS = 60.0
_LAST_LINES = 3
_OF_JUPYTER = ("CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "MPLBACKEND")
"""Variables that a Jupyter kernel sets for itself. A command that is shown line by line must not draw progress bars."""


class Stop(UserError):
    """A mistake of the user. Jupyter shows it as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in place of the traceback."""
        return [str(self)]


class Session:
    """One session of a notebook platform.

    Args:
        began_at: when the session began, in seconds since 1970.
        hours: hours after which the platform ends the session.
        keep: folder whose files outlast the session.
        local: folder on a local disk for tokenizer and shards; None: `keep` is on a local disk.
        scratch: folder on a local disk for caches, which may be lost.
        device: the value of `train.device`; ``cuda`` refuses to train without a GPU.
    """

    def __init__(
        self, *, began_at: float, hours: float, keep: str, local: str | None = None, scratch: str, device: str = "cuda"
    ) -> None:
        self._training_ends_at = began_at + 3600 * hours - MARGIN_SECONDS
        self._keep, self._scratch, self._device = Path(keep), Path(scratch), device
        self._local = self._keep if local is None else Path(local)
        self._shards = str(self._local / SHARDS)

    def install(self) -> None:
        """Install what pyproject.toml requires, in the versions of requirements.lock, and try the GPU.

        Raises:
            Stop: a package cannot be installed, or torch cannot use a GPU although `device` is ``cuda``.
        """
        packages = choose_packages(REPOSITORY, installed_torch())
        _say(packages.reason)
        self._scratch.mkdir(parents=True, exist_ok=True)
        constraints = self._scratch / "constraints.txt"
        constraints.write_text("\n".join(packages.constraints) + "\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        as_root = ["--root-user-action", "ignore"]
        if packages.replaces_torch:
            self._must([*pip, "uninstall", "--yes", *as_root, *TORCH_COMPANIONS], "the packages cannot be removed")
        command = [*pip, "install", *as_root, "--constraint", str(constraints), *packages.requirements]
        self._must(command, "the packages cannot be installed")
        if self._device == "cuda":
            self._try_gpu()

    def take_over(self, inputs: str) -> None:
        """Copy what the newest session below the read-only folder `inputs` has left, to go on with it.

        A copy, because a run is one run: it goes on with its log, its tracker and its choices, and each output is
        whole, so that the session after this one needs no other. An output whose marker is damaged is left out.
        """
        markers = find_markers(Path(inputs))
        for marker, problem in markers.damaged.items():
            _say(f"{marker} is ignored, with the folders beside it, because {problem}")
        found = find_session(markers.numbers, self._keep)
        if found is None:
            usable = " that can be used" if markers.damaged else ""
            _say(f"{inputs} has no output of an earlier session{usable}: this is the first one")
            number = 1
        else:
            number = found.number + 1
            for source in found.folders:
                size = copy_folder(source, self._keep / source.name)
                _say(f"{source}: copied to {self._keep} ({size / 1e9:.2f} GB)")
        write_session(self._keep, number)

    def prepare(self, config: str, corpus: str, *, shards: str = "", tokenizer: str = "", settings: str = "") -> None:
        """Make tokenizer and shards, unless they are there.

        Args:
            config: settings file, such as ``configs/wiki-54m.yaml``.
            corpus: the value of `data.source`.
            shards: finished shards, used where they are; empty: make them.
            tokenizer: a tokenizer to use; empty: train one on the corpus.
            settings: further words of the command line for `tokenizer` and `prepare`.

        Raises:
            Stop: `settings` cannot be read, or one of the commands failed.
        """
        if shards:
            self._shards = shards
            _say(f"shards: {shards}, used where they are")
            return
        folder = self._local / SHARDS
        for name in (TOKENIZER, SHARDS):
            if self._local != self._keep and _is_whole(self._keep / name) and not _is_whole(self._local / name):
                copy_folder(self._keep / name, self._local / name)
        if _is_whole(folder):
            _say(f"shards: {folder}, made by an earlier session")
            return
        source = tokenizer or str(self._local / TOKENIZER)
        words = ["--config", config, "--data.source", corpus, "--data.shards", str(folder)]
        words += ["--tokenizer.source", source, *_words("DATA_SETTINGS", settings)]
        if not tokenizer and not _is_whole(self._local / TOKENIZER):
            self._must(_job("tokenizer", *words), "the tokenizer was not made")
        processes = str(len(os.sched_getaffinity(0)))
        self._must(_job("prepare", "--data.processes", processes, *words), "the shards were not made")
        for name in (TOKENIZER, SHARDS):
            if self._local != self._keep and _is_whole(self._local / name):
                copy_folder(self._local / name, self._keep / name)

    def train(self, config: str, *, output: str = "", every_minutes: int = 30, settings: str = "") -> None:
        """Train until the run is done, or save and stop shortly before the session ends.

        Args:
            config: settings file.
            output: the value of `run.output`; empty: ``run`` in the folder that outlasts the session.
            every_minutes: longest time between two checkpoints, in minutes.
            settings: further words of the command line, which override those that this method chooses.

        Raises:
            Stop: the configuration or `settings` is wrong, the run makes no progress, or the training has crashed
                several times.
        """
        output = output or str(self._keep / "run")
        further = _words("TRAIN_SETTINGS", settings)
        mine, kept = self._local / TRACKER, self._keep / TRACKER
        if kept.is_dir() and not mine.exists():  # The tracker goes on with its files of the earlier sessions.
            copy_folder(kept, mine)
        for start in range(1, _STARTS + 1):
            words = self._training_words(config, output, every_minutes)
            code = self._run(_job("train", *words, *further))[0]
            if self._local != self._keep and mine.is_dir():
                merge_folder(mine, kept)
            if code in (EXIT_DONE, EXIT_STOPPED, EXIT_REFUSED, EXIT_NO_PROGRESS):
                break
            _say(f"the training crashed (exit code {code}), start {start} of {_STARTS}")
        _say(f"{self._keep} has {folder_bytes(self._keep) / 1e9:.2f} GB, which outlast this session")
        if code == EXIT_DONE:
            _say(f"done: the model is in {output}/final")
        elif code == EXIT_STOPPED:
            _say("not done: the next session goes on from here")
        else:
            again = code not in (EXIT_REFUSED, EXIT_NO_PROGRESS)
            remedy = (
                "run the notebook again" if again else "correct what the lines above say; it cannot help to start again"
            )
            raise Stop("train", None, f"ended with exit code {code}", remedy)

    def _training_words(self, config: str, output: str, every_minutes: int) -> Iterator[str]:
        """Yield the command line of `job train` for a start at this moment."""
        seconds = self._training_ends_at - time.time()
        if seconds < _SHORTEST_SECONDS:
            raise Stop("train.max_time", None, "this session has no time left for training", "start a new session")
        chosen = {
            "--config": config,
            "--run.output": output,
            "--data.shards": self._shards,
            "--train.device": self._device,
            "--train.max_time": f"{seconds:.0f}s",
            "--checkpoint.keep": str(KEEP),
            "--checkpoint.every_minutes": str(every_minutes),
            "--tracking.log_dir": str(self._local / TRACKER),
        }
        if self._local != self._keep and "://" not in output:  # Drive has no hard links and no exclusive rename.
            chosen["--store.single_writer"] = "true"
        for name, value in chosen.items():
            yield from (name, value)

    def _try_gpu(self) -> None:
        """Raise Stop if torch cannot use a GPU: preparing the data first would waste the time of a session."""
        code, lines = self._run([sys.executable, "-m", "job.launcher.device"], shown=False)
        found = {"gpus": [], "error": " ".join(lines[-1:]), "build": ""}
        with suppress(ValueError, IndexError):
            found = json.loads(lines[-1])
        if code != 0 or found["error"] or not found["gpus"]:
            problem = f"torch can use no GPU: {found['error'] or 'there is none'} ({found['build']})"
            raise Stop("DEVICE", "cuda", problem, "switch the GPU on in the notebook's settings, or set DEVICE to cpu")
        _say(f"GPUs: {', '.join(found['gpus'])}")

    def _must(self, command: Sequence[str], problem: str) -> None:
        """Run a command; raise Stop with its last lines if it fails."""
        code, lines = self._run(command)
        if code != 0:
            raise Stop("setup", None, f"{problem} (exit code {code}): {' / '.join(lines)}", "")

    def _run(self, command: Sequence[str], shown: bool = True) -> tuple[int, list[str]]:
        """Run a command in the repository, show its output as it comes, and return exit code and last lines.

        If the user interrupts the notebook, the command is asked to stop, and its end is awaited.
        """
        environment = {name: value for name, value in os.environ.items() if name not in _OF_JUPYTER}
        environment |= {"WIKILLM_SCRATCH": str(self._scratch), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        lines: list[str] = []
        with subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            while True:
                try:
                    for line in process.stdout:
                        lines = [*lines[1 - _LAST_LINES :], line.strip()] if line.strip() else lines
                        if shown:
                            sys.stdout.write(line)
                    return process.wait(), lines
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)


def set_secrets(names: Sequence[str]) -> None:
    """Set environment variables from the secrets of these names, which the platform keeps for the user.

    Raises:
        Stop: the platform has no such secret, or does not let this notebook read it.
    """
    for name in names:
        if os.environ.get(name):
            continue
        try:
            os.environ[name] = _secret(name)
        except Exception as error:  # Each platform has exceptions of its own.
            remedy = "add it to the secrets of the notebook, and let the notebook read it"
            raise Stop("SECRETS", name, f"cannot be read: {type(error).__name__}", remedy) from None


def _secret(name: str) -> str:
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        from google.colab import userdata

        return str(userdata.get(name))
    return str(UserSecretsClient().get_secret(name))


def _is_whole(folder: Path) -> bool:
    """Return True if the folder holds a finished data set, whose manifest is written last, or a tokenizer."""
    return (folder / {SHARDS: "manifest.json", TOKENIZER: "tokenizer.json"}[folder.name]).exists()


def _words(setting: str, value: str) -> list[str]:
    """Return the words of a setting of the notebook that is a part of a command line."""
    try:
        return shlex.split(value)
    except ValueError as error:
        open_quote = "quotation" in str(error)
        problem, remedy = ("has an open quote", "close it") if open_quote else ("ends with a backslash", "remove it")
        raise Stop(setting, value, problem, remedy) from None


def _job(command: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "job", command, *words]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
