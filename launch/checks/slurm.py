"""Check the Slurm script against the settings: its #SBATCH options, image, signal handling and exit codes."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from job import storage
from job.config import Config
from job.errors import EXIT_STOPPED, UserError
from job.model.gpu_table import GPUS, Gpu
from job.preflight.findings import Findings
from job.preflight.target import SLURM_SCRIPT, Target
from launch.checks.kubernetes import PLACEHOLDER

DEFAULT_CONFIG = "configs/wiki-123m.yaml"
"""Config that the script uses without JOB_CONFIG and job.yaml."""
_SHORT = {"N": "nodes", "n": "ntasks", "t": "time", "G": "gpus", "J": "job-name", "p": "partition", "o": "output"}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPU = re.compile(r"gpu(:|$)")
_KILL_WAIT_SECONDS = 30
"""Slurm's default KillWait: the time between SIGTERM at the limit and SIGKILL."""
_RUNTIMES = {"pyxis": "", "apptainer": "apptainer", "charliecloud": "ch-run"}
"""Container runtimes of the script, each with the program that it needs on the nodes."""
_SBATCH_SECONDS = 20


def check_slurm(findings: Findings, config: Config, script: Path) -> Target | None:
    """Check the script; return the nodes that it requests, or None if it cannot be read.

    It raises no error: every problem becomes a row of `findings`.
    """
    with findings.guard("script"):
        text = _read(script)
        options = _directives(text)
        findings.right("script", f"{script}: {' '.join(f'--{name}={value}' for name, value in options.items())}")
        gpus, kind = _gpus(findings, options)
        _check_tasks(findings, options)
        _check_requeue(findings, text, options)
        _check_runtime(findings, text)
        _check_locations(findings, config)
        _ask_slurm(findings, script)
        if not gpus:
            findings.unsure("GPUs", "no GPU is requested, so it trains on the CPU", "add #SBATCH --gpus-per-node=N")
        gpu = _gpu_of(findings, kind)
        processes = config.train.processes or max(1, gpus)
        if gpus and processes > gpus:
            remedy = f"set train.processes to null, or --gpus-per-node to {processes}"
            findings.wrong("GPUs", f"{gpus} GPUs on each node for {processes} training processes", remedy)
        return Target(
            name="Slurm",
            nodes=int(options.get("nodes", "1").partition("-")[0]),
            gpus_per_node=gpus,
            processes_per_node=processes,
            gpu_capability=None if gpu is None else gpu.capability,
            gpu_memory_bytes=None if gpu is None else gpu.memory_bytes[-1],
            time_limit_seconds=_seconds(options["time"]) if "time" in options else None,
            grace_seconds=_check_warning(findings, text, options),
        )
    return None


def _gpu_of(findings: Findings, kind: str) -> Gpu | None:
    """Return the GPU of a type such as ``a100`` or ``rtx4090``, and say which it is; None if the type is not known."""
    for gpu in GPUS:
        name = re.sub(r"\W", "", gpu.name).lower()
        if re.sub(r"[\W_]", "", kind) in (name, name.removeprefix("rtx")):
            findings.right("GPU type", f"{kind}: taken for {gpu.name} with {gpu.memory_bytes[-1] / 2**30:.0f} GiB")
            return gpu
    return None


def _read(script: Path) -> str:
    try:
        content = script.read_bytes()
    except OSError as error:
        remedy = "restore it from the repository"
        raise UserError(str(script), None, f"cannot be read: {error.strerror}", remedy) from None
    if b"\r\n" in content:
        remedy = f"sed -i 's/\\r$//' {script}"
        raise UserError(str(script), None, "its lines end in CRLF, which sbatch refuses", remedy)
    if not content.startswith(b"#!"):
        remedy = "add #!/usr/bin/env bash as the first line"
        raise UserError(str(script), None, "does not begin with #!, so sbatch refuses it", remedy)
    return content.decode()


def _directives(text: str) -> dict[str, str]:
    """Return the options of the #SBATCH lines by their long names. Like sbatch, stop at the first command."""
    options: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        while words:
            word = words.pop(0)
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
            else:
                name, value = _SHORT.get(word[1:2], word[1:2]), word[2:]
                equals = value
            if not equals and words and not words[0].startswith("-"):
                value = words.pop(0)
            options[name] = value
    return options


def _seconds(text: str) -> float | None:
    """Return the seconds of a Slurm time limit; None if it is unlimited.

    The forms are minutes, minutes:seconds, hours:minutes:seconds and days-hours[:minutes[:seconds]].
    Source: sbatch(1), --time.

    Raises:
        UserError: `text` has none of these forms.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError("--time", text, "is not a time limit", "write hours:minutes:seconds, or days-hours")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return (days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _gpus(findings: Findings, options: dict[str, str]) -> tuple[int, str]:
    """Return the number of GPUs on each node and their type in lower case; the type is empty if it is not given."""
    resources = options.get("gres", "").split(",")
    gres = next((resource.partition(":")[2] or "1" for resource in resources if _GPU.match(resource)), "")
    requests = {"gres": gres} | {name: options[name] for name in ("gpus-per-node", "gpus-per-task") if name in options}
    requested = {f"--{name}": _parse_gpus(text) for name, text in requests.items() if text}
    if "gpus" in options:
        count, kind = _parse_gpus(options["gpus"])
        requested["--gpus"] = count // int(options.get("nodes", "1").partition("-")[0]), kind
    if len({count for count, _ in requested.values()}) > 1:
        counts = " and ".join(f"{count} by {name}" for name, (count, _) in requested.items())
        found = f"the script requests different numbers of GPUs on each node: {counts}"
        findings.wrong("GPUs", found, "keep #SBATCH --gpus-per-node=N alone")
    return next(iter(requested.values()), (0, ""))


def _parse_gpus(text: str) -> tuple[int, str]:
    """Return the number and the type of GPUs in ``2``, ``h100`` or ``h100:2``."""
    kind, _, count = text.rpartition(":")
    return (int(count), kind.lower()) if count.isdecimal() else (1, count.lower())


def _check_warning(findings: Findings, text: str, options: dict[str, str]) -> float | None:
    """Check --signal; return the seconds between Slurm's warning signal and SIGKILL, or None if they are not known."""
    name, signal = "warning", re.fullmatch(r"(B:)?(\w+)@(\d+)", options.get("signal", ""))
    remedy = "#SBATCH --signal=B:USR1@400: more than checkpoint.stop_deadline and one training step"
    if "time" not in options:
        found = "the script requests no time limit, so the partition's default applies"
        findings.unsure("time limit", found, "add #SBATCH --time")
    if signal is None:
        found = f"no --signal: at the time limit the job has only {_KILL_WAIT_SECONDS} s before SIGKILL"
        findings.wrong(name, found, remedy)
        return _KILL_WAIT_SECONDS
    if not signal[1]:
        found = f"--signal={options['signal']} does not reach the script, which must requeue the job"
        findings.wrong(name, found, remedy)
        return None
    if not re.search(rf"^\s*trap\s.*\b(SIG)?{signal[2].removeprefix('SIG')}\b", text, re.MULTILINE):
        findings.wrong(name, f"the script has no trap for {signal[2]}, so the signal ends it", remedy)
        return None
    limit = _seconds(options["time"]) if "time" in options else None
    if limit is not None and int(signal[3]) >= limit:
        found = f"the warning {signal[3]} s before the limit of {limit:.0f} s comes at the start"
        findings.wrong(name, found, "request more --time")
        return None
    findings.right(name, f"{signal[2]} to the script {signal[3]} s before the limit")
    return float(signal[3]) + _KILL_WAIT_SECONDS


def _check_tasks(findings: Findings, options: dict[str, str]) -> None:
    name, tasks_per_node = "tasks", options.get("ntasks-per-node")
    remedy = "#SBATCH --ntasks-per-node=1, because the entrypoint itself starts the training processes of its node"
    nodes = options.get("nodes", "1").partition("-")[0]
    if tasks_per_node not in (None, "1"):
        findings.wrong(name, f"{tasks_per_node} tasks on each node", remedy)
    elif options.get("ntasks", nodes) != nodes:
        findings.wrong(name, f"{options['ntasks']} tasks on {nodes} nodes", remedy)
    else:
        findings.right(name, "one on each node, which starts the training processes")


def _check_requeue(findings: Findings, text: str, options: dict[str, str]) -> None:
    name = "requeue"
    commands = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    if not re.search(r"--kill-on-bad-exit(?!=0)|--wait=(?!0\b)", commands):
        remedy = "add --wait=60 or --kill-on-bad-exit=1 to srun"
        findings.wrong(name, "when one node fails, srun waits for the others without a limit", remedy)
    elif "scontrol requeue" not in commands or str(EXIT_STOPPED) not in commands:
        found = f"the script does not requeue the job after exit code {EXIT_STOPPED}"
        findings.wrong(name, found, f"use the end of {SLURM_SCRIPT}")
    elif "no-requeue" in options:
        findings.wrong(name, "with --no-requeue Slurm refuses to requeue the job", "#SBATCH --requeue")
    elif options.get("open-mode") != "append":
        findings.unsure(name, "each requeue empties the log", "#SBATCH --open-mode=append")
    else:
        findings.right(name, f"on exit code {EXIT_STOPPED}; the log is appended to")


def _check_runtime(findings: Findings, text: str) -> None:
    """Check the image and the container runtime."""
    image, runtime = (os.environ.get(name) or _variable(text, name) or "" for name in ("IMAGE", "RUNTIME"))
    if runtime == "none":
        findings.right("image", "RUNTIME=none: no image, but the virtual environment of this folder")
    elif runtime not in _RUNTIMES:
        findings.wrong("image", f"RUNTIME={runtime}", f"expected none, {', '.join(_RUNTIMES)}")
    elif PLACEHOLDER in image:
        findings.wrong("image", f"{image} is a placeholder", "make build push set-image, or RUNTIME=none")
    elif (program := _RUNTIMES[runtime]) and shutil.which("sbatch") and not shutil.which(program):
        found = f"RUNTIME={runtime}, but {program} is not installed here"
        findings.unsure("image", found, "check that the nodes have it")
    else:
        findings.right("image", f"{image}, run by {runtime}")


def _variable(text: str, name: str) -> str | None:
    """Return the default of a variable of the script, from ``NAME=value`` or ``NAME=${NAME:-value}``."""
    match = re.search(rf'^\s*(?:export )?{name}="?(?:\$\{{{name}:-)?([^}}"\s#]*)', text, re.MULTILINE)
    return None if match is None else match[1]


def _check_locations(findings: Findings, config: Config) -> None:
    for setting, url in (("run.output", config.run.output), ("data.shards", config.data.shards)):
        if not storage.is_remote(url):
            found = f"{setting}: {url} is a folder, which all nodes and this machine must share"
            findings.unsure(setting, found, "use a folder on the cluster's shared file system, or an s3:// URL")


def _ask_slurm(findings: Findings, script: Path) -> None:
    """Check the script with `sbatch --test-only`, if this machine can submit jobs."""
    if (program := shutil.which("sbatch")) is None:
        findings.unsure("sbatch", "not installed on this machine", "submit the script from a login node")
        return
    command = [program, "--test-only", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SBATCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        findings.unsure("sbatch", f"no answer within {_SBATCH_SECONDS} s", "submit the script from a login node")
        return
    output = (done.stderr or done.stdout).strip().removeprefix("sbatch: ")
    if re.search("configuration source|contact slurm controller", output):
        found = f"no Slurm cluster answers here: {output.splitlines()[-1]}"
        findings.unsure("sbatch", found, "submit the script from a login node")
    else:
        output = output or f"exit code {done.returncode} without a message"
        findings.judge("sbatch", done.returncode == 0, output, "correct what Slurm names")
