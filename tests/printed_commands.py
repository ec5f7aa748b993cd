"""Commands that a page or the program prints, and a shell as a newcomer has it: no virtual environment, a bare PATH."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
REASONS = {
    "account": "an account, and credentials",
    "cluster": "Slurm or Kubernetes",
    "gpu": "a GPU",
    "image": "Docker or Podman, and a registry",
    "network": "more of the network than the package index",
    "nodes": "several machines",
    "time": "minutes: another target runs it",
}
"""Why a command is not run here, by the word that stands beside it."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<key>\w+): (?P<value>[\w, ]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A block of a page between two lines of three backticks."""

    page: str
    kind: str
    """What stands behind the first three backticks: ``bash``, ``text``."""
    text: str
    needs: tuple[str, ...]
    """Why it is not run."""
    after: str | None
    """What has to have run before."""

    @property
    def commands(self) -> str:
        """Its text without comments, which are in the page's language."""
        return "\n".join(re.sub(r"\s+#.*", "", line) for line in self.text.splitlines() if line)


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page of the repository, from its top."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(list(_BLOCK.finditer(text))), "a block that is not understood"
    return [
        Block(
            page,
            one["kind"],
            one["text"],
            tuple(one["value"].split(", ")) if one["key"] == "needs" else (),
            one["value"] if one["key"] == "after" else None,
        )
        for one in _BLOCK.finditer(text)
    ]


def checkout(folder: Path) -> Path:
    """Makes `folder` a checkout with its virtual environment, of links; configs/ is a copy that may be added to."""
    for name in ("job", "launch", "benchmarks", "Makefile"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "configs").mkdir()
    for path in (REPOSITORY / "configs").iterdir():
        (folder / "configs" / path.name).write_bytes(path.read_bytes())
    return folder


def fresh_shell(script: str, folder: Path) -> list[str]:
    """The words that run `script` in a shell that has inherited nothing; its home is in `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    variables = [f"HOME={home}", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "HF_HUB_OFFLINE=1"]
    return ["env", "-i", *variables, "bash", "-euo", "pipefail", "-c", script]


def run_in_fresh_shell(script: str, folder: Path) -> str:
    """What `script` prints in such a shell, in `folder`; it has to end with 0."""
    ended = subprocess.run(
        fresh_shell(script, folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout}"
    return ended.stdout
