"""Stand-ins for Slurm's programs on one node, in a folder that is first in PATH. They can fail or hang."""

import os
import subprocess
import time
from pathlib import Path

from printed_commands import REPOSITORY

ENROOT = r"docker://(([[:alnum:]_.!~*'()%;:&=+$,-@]+)@)?(([^#]+)#)?([[:lower:][:digit:]/._-]+)(:([[:alnum:]._:-]+))?"
"""Names of images that enroot accepts since version 3.0.1."""
SRUN = r"""#!/bin/bash
# Runs one task on this machine. With an image it prints how pyxis and enroot parse its name, and starts no container.
[[ -e $0.broken ]] && { echo "srun: error: Unable to create step for job 1: Job/step already completing" >&2; exit 1; }
image='' enroot=$(cat "$0.names")
while [[ $1 == --* ]]; do
    case $1 in
        --help) echo "Usage: srun [OPTIONS] --ntasks=N --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH" && exit ;;
        --container-image=*) image=${1#*=} ;;
    esac
    shift
done
if [[ $image == [./]* ]]; then
    printf 'file %s\n' "$image" && exit
elif [[ $image ]]; then
    [[ docker://$image =~ $enroot ]] && printf 'user=%s registry=%s name=%s tag=%s\n' \
        "${BASH_REMATCH[2]}" "${BASH_REMATCH[4]}" "${BASH_REMATCH[5]}" "${BASH_REMATCH[7]}" && exit
    echo "slurmstepd: error: pyxis: [ERROR] Invalid image reference: docker://$image" >&2
    exit 1
fi
trap 'kill -USR1 $task' USR1
trap '' TERM
SLURM_PROCID=0 "$@" &
task=$! code=''
until [[ $code ]] && ! kill -0 $task 2>/dev/null; do wait $task; code=$?; done
((code)) && echo "srun: error: n1: task 0: Exited with exit code $code" >&2
exit $code
"""
_SHELL = "#!/bin/bash\n"


class Site:
    """A folder from which to submit, the stand-ins for a cluster, and the log of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "wikillm-1.log"
        self.bin.mkdir()
        self.program("srun", SRUN)
        (self.bin / "srun.names").write_text(f"^{ENROOT}$")
        self.program("squeue", "echo NONE N/A")
        self.program("scontrol", f'echo "$*" >> {folder}/scontrol')
        self.program("scancel", f'echo "$*" >> {folder}/scancel')
        self.program("python", '[[ $1 == -c ]] || echo "$*"')
        for name in ("configs/wiki-123m.yaml", "other.yaml", "job/__main__.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()

    def program(self, name: str, script: str) -> Path:
        """Create or replace a stand-in program, which runs this bash script."""
        path = self.bin / name
        path.write_text(script if script.startswith("#!") else _SHELL + script + "\n")
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[str]:
        """Return the arguments of each call of a program that records them, one line for each call."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *words: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start launch/slurm.sh; its output is appended to the log."""
        inherited = ("PATH", "HOME", "LANG", "TMPDIR")
        environment = {name: os.environ[name] for name in inherited if name in os.environ}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.bin / "python")}
        environment |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "wikillm"}
        environment |= {"HOME": str(self.folder), "SCRATCH": str(self.folder / "scratch")} | variables
        command = ["bash", str(REPOSITORY / "launch" / "slurm.sh"), *map(str, words)]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=cwd or self.folder, env=environment, stdout=log, stderr=log)

    def run(self, *words: str | Path, cwd: Path | None = None, **variables: str) -> int:
        """Run launch/slurm.sh and return its exit code."""
        return self.start(*words, cwd=cwd, **variables).wait(timeout=120)

    @property
    def lines(self) -> list[str]:
        """Lines of the log so far."""
        return self.log.read_text().splitlines()

    def messages(self) -> list[str]:
        """Return the messages of launch/slurm.sh, without those about a start."""
        messages = [line.partition(": job 1: ")[2] for line in self.lines if line.startswith("slurm.sh: job 1: ")]
        return [message for message in messages if not message.startswith(("start ", "the entrypoint starts"))]

    def await_line(self, line: str) -> None:
        """Wait until the log contains `line`."""
        deadline = time.monotonic() + 60
        while line not in self.log.read_text():
            assert time.monotonic() < deadline, f"{line!r} is not in\n{self.log.read_text()}"
            time.sleep(0.05)
