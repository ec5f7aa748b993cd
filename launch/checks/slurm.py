"""launch/slurm.sh against the settings: its #SBATCH lines, as they stand, and what it says of image and exit codes."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from job import storage
from job.config import Config
from job.errors import EXIT_STOPPED, UserError
from job.preflight.findings import Findings
from job.preflight.target import SLURM_SCRIPT, Target
from job.preflight.workload import GPUS
from launch.checks.kubernetes import PLACEHOLDER

DEFAULT_CONFIG = "configs/wiki-123m.yaml"
"""Of the script, where there is neither JOB_CONFIG nor job.yaml."""
_SHORT = {"N": "nodes", "n": "ntasks", "t": "time", "G": "gpus", "J": "job-name", "p": "partition", "o": "output"}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPU = re.compile(r"gpu(:|$)")
_KILL_WAIT_SECONDS = 30
"""Slurm's default KillWait, between the end of the time and SIGKILL."""
_RUNTIMES = {"pyxis": "", "apptainer": "apptainer", "charliecloud": "ch-run"}
"""By which the script starts a container, and the program that this takes."""
_SBATCH_SECONDS = 20


def check_slurm(findings: Findings, config: Config, script: Path) -> Target | None:
    """The world that the script asks for; None if it cannot be read.

    Raises nothing: what is wrong becomes a row.
    """
    with findings.guard("script"):
        text = _read(script)
        options = _directives(text)
        findings.right("script", f"{script}: {' '.join(f'--{name}={value}' for name, value in options.items())}")
        gpus, kind = _gpus(findings, options)
        _check_tasks(findings, options)
        _check_requeue(findings, text, options)
        _check_runtime(findings, text)
        _check_places(findings, config)
        _ask_slurm(findings, script)
        if not gpus:
            findings.unsure("GPUs", "none are asked for: it trains on the CPU", "add #SBATCH --gpus-per-node=N")
        processes = config.train.processes or max(1, gpus)
        if gpus and processes > gpus:
            remedy = f"set train.processes to null, or --gpus-per-node to {processes}"
            findings.wrong("GPUs", f"{gpus} of a node for {processes} processes", remedy)
        memory = next((gpu.memory_bytes for gpu in GPUS if kind and kind in re.sub(r"\W", "", gpu.name).lower()), None)
        return Target(
            name="Slurm",
            nodes=int(options.get("nodes", "1").partition("-")[0]),
            gpus=gpus,
            processes=processes,
            gpu_memory_bytes=memory,
            seconds=_seconds(options["time"]) if "time" in options else None,
            grace_seconds=_warning(findings, text, options),
        )
    return None


def _read(script: Path) -> str:
    try:
        content = script.read_bytes()
    except OSError as error:
        raise UserError(str(script), None, f"cannot be read: {error.strerror}", "take it from the repository") from None
    if b"\r\n" in content:
        raise UserError(str(script), None, "its lines end in CRLF, which sbatch refuses", f"sed -i 's/\\r$//' {script}")
    if not content.startswith(b"#!"):
        raise UserError(str(script), None, "it does not begin with #!, so sbatch refuses it", "add #!/usr/bin/env bash")
    return content.decode()


def _directives(text: str) -> dict[str, str]:
    """The options on #SBATCH lines, by their long names; sbatch reads them up to the first command."""
    found: dict[str, str] = {}
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
            found[name] = value
    return found


def _seconds(text: str) -> float | None:
    """A time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None: unlimited.

    Source: sbatch(1), --time.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise UserError("--time", text, "is no time limit", "write hours:minutes:seconds, or days-hours")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return (days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _gpus(findings: Findings, options: dict[str, str]) -> tuple[int, str]:
    """GPUs of a node and their kind, in small letters; empty where it is not said."""
    gres = next((one.partition(":")[2] or "1" for one in options.get("gres", "").split(",") if _GPU.match(one)), "")
    asked = {"gres": gres} | {name: options[name] for name in ("gpus-per-node", "gpus-per-task") if name in options}
    found = {f"--{name}": _counted(text) for name, text in asked.items() if text}
    if "gpus" in options:
        count, kind = _counted(options["gpus"])
        found["--gpus"] = count // int(options.get("nodes", "1").partition("-")[0]), kind
    if len({count for count, _ in found.values()}) > 1:
        said = " and ".join(f"{name} for {count}" for name, (count, _) in found.items())
        findings.wrong("GPUs", f"of a node: the script asks by {said}", "keep #SBATCH --gpus-per-node=N alone")
    return next(iter(found.values()), (0, ""))


def _counted(text: str) -> tuple[int, str]:
    """How many GPUs, and of which kind: ``2``, ``h100`` or ``h100:2``."""
    kind, _, count = text.rpartition(":")
    return (int(count), kind.lower()) if count.isdecimal() else (1, count.lower())


def _warning(findings: Findings, text: str, options: dict[str, str]) -> float | None:
    """Seconds between Slurm's warning and SIGKILL."""
    name, found = "warning", re.fullmatch(r"(B:)?(\w+)@(\d+)", options.get("signal", ""))
    remedy = "#SBATCH --signal=B:USR1@400, of which checkpoint.stop_deadline is the larger part"
    if "time" not in options:
        findings.unsure("time limit", "the script asks for none: the partition's own holds", "add #SBATCH --time")
    if found is None:
        findings.wrong(name, "no --signal: at the limit there are 30 s, and then SIGKILL", remedy)
        return _KILL_WAIT_SECONDS
    if not found[1]:
        findings.wrong(name, f"--signal={options['signal']} goes past the script, which has to requeue", remedy)
        return None
    if not re.search(rf"^\s*trap\s.*\b(SIG)?{found[2].removeprefix('SIG')}\b", text, re.MULTILINE):
        findings.wrong(name, f"the script has no trap for {found[2]}, and dies of it", remedy)
        return None
    limit = _seconds(options["time"]) if "time" in options else None
    if limit is not None and int(found[3]) >= limit:
        findings.wrong(name, f"{found[3]} s before the end of {limit:.0f} s: at once", "ask for more --time")
        return None
    findings.right(name, f"{found[2]} to the script {found[3]} s before the limit")
    return float(found[3]) + _KILL_WAIT_SECONDS


def _check_tasks(findings: Findings, options: dict[str, str]) -> None:
    name, of_node = "tasks", options.get("ntasks-per-node")
    remedy = "#SBATCH --ntasks-per-node=1: the entrypoint starts the processes of its node itself"
    nodes = options.get("nodes", "1").partition("-")[0]
    if of_node not in (None, "1"):
        findings.wrong(name, f"{of_node} on each node", remedy)
    elif options.get("ntasks", nodes) != nodes:
        findings.wrong(name, f"{options['ntasks']} tasks on {nodes} nodes", remedy)
    else:
        findings.right(name, "one on each node, which starts the others")


def _check_requeue(findings: Findings, text: str, options: dict[str, str]) -> None:
    name = "requeue"
    commands = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    if not re.search(r"--kill-on-bad-exit(?!=0)|--wait=(?!0\b)", commands):
        remedy = "give srun --wait=60, or --kill-on-bad-exit=1"
        findings.wrong(name, "when a node has failed, srun waits for the others without end", remedy)
    elif "scontrol requeue" not in commands or str(EXIT_STOPPED) not in commands:
        findings.wrong(name, f"exit code {EXIT_STOPPED} does not start it again", f"take the end of {SLURM_SCRIPT}")
    elif "no-requeue" in options:
        findings.wrong(name, "--no-requeue: Slurm refuses to start it again", "#SBATCH --requeue")
    elif options.get("open-mode") != "append":
        findings.unsure(name, "each start empties the log of the one before", "#SBATCH --open-mode=append")
    else:
        findings.right(name, f"on exit code {EXIT_STOPPED}; the log goes on")


def _check_runtime(findings: Findings, text: str) -> None:
    """The container, if it runs in one, and what that takes."""
    image, runtime = (os.environ.get(name) or _variable(text, name) or "" for name in ("IMAGE", "RUNTIME"))
    if runtime == "none":
        findings.right("image", "RUNTIME=none: the virtual environment of this folder")
    elif runtime not in _RUNTIMES:
        findings.wrong("image", f"RUNTIME={runtime}", f"expected none, {', '.join(_RUNTIMES)}")
    elif PLACEHOLDER in image:
        findings.wrong("image", f"{image} is a placeholder", "make build push set-image, or RUNTIME=none")
    elif (program := _RUNTIMES[runtime]) and shutil.which("sbatch") and not shutil.which(program):
        findings.unsure("image", f"RUNTIME={runtime}, and there is no {program} here", "see that the nodes have it")
    else:
        findings.right("image", f"{image} by {runtime}")


def _variable(text: str, name: str) -> str | None:
    """What a variable of the script is by default: NAME=value or NAME=${NAME:-value}."""
    found = re.search(rf'^\s*(?:export )?{name}="?(?:\$\{{{name}:-)?([^}}"\s#]*)', text, re.MULTILINE)
    return None if found is None else found[1]


def _check_places(findings: Findings, config: Config) -> None:
    for setting, url in (("run.output", config.run.output), ("data.shards", config.data.shards)):
        if not storage.is_remote(url):
            found = f"{setting}: {url} is a folder: all nodes, and this machine, have to see the same one"
            findings.unsure(setting, found, "give a folder of the cluster's shared file system, or an s3:// URL")


def _ask_slurm(findings: Findings, script: Path) -> None:
    """What Slurm itself makes of the script, where this machine can submit one."""
    if (program := shutil.which("sbatch")) is None:
        findings.unsure("sbatch", "is not on this machine", "submit it from one that has it")
        return
    command = [program, "--test-only", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SBATCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        findings.unsure("sbatch", f"no answer in {_SBATCH_SECONDS} s", "submit it from a login node")
        return
    said = (done.stderr or done.stdout).strip().removeprefix("sbatch: ")
    if re.search("configuration source|contact slurm controller", said):
        findings.unsure("sbatch", f"no Slurm answers here: {said.splitlines()[-1]}", "submit it from a login node")
    else:
        said = said or f"exit code {done.returncode}, and no word"
        findings.judge("sbatch", done.returncode == 0, said, "correct what Slurm names")
