"""Reads the commands of a page, and runs them in a shell like a newcomer's: no virtual environment, a default PATH."""

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
"""The reason why a command is not run here, by the word in the comment above it."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<key>\w+): (?P<value>[\w, ]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A code block of a page, between two lines of three backticks."""

    page: str
    kind: str
    """The word after the first three backticks: ``bash`` or ``text``."""
    text: str
    needs: tuple[str, ...]
    """What the block needs that a test does not have; empty if the block is run."""
    after: str | None
    """What must run before the block."""
    is_slow: bool
    """True if the block takes minutes; `make test-recovery` runs it."""

    @property
    def commands(self) -> str:
        """The text without comments, which are in the language of the page."""
        return "\n".join(re.sub(r"\s+#.*", "", line) for line in self.text.splitlines() if line)


def blocks_of(page: str) -> list[Block]:
    """Return the code blocks of a page, from top to bottom."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(list(_BLOCK.finditer(text))), "a block that cannot be parsed"
    return [
        Block(
            page,
            match["kind"],
            match["text"],
            tuple(match["value"].split(", ")) if match["key"] == "needs" else (),
            match["value"] if match["key"] == "after" else None,
            match["key"] == "slow",
        )
        for match in _BLOCK.finditer(text)
    ]


def checkout(folder: Path) -> Path:
    """Make `folder` look like a checkout with a virtual environment, with links. Only configs/ is a copy."""
    for name in ("job", "launch", "benchmarks", "docs", "Makefile"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "configs").mkdir()
    for path in (REPOSITORY / "configs").iterdir():
        (folder / "configs" / path.name).write_bytes(path.read_bytes())
    return folder


def fresh_shell(script: str, folder: Path) -> list[str]:
    """Return the command that runs `script` in a shell without inherited variables, with its home in `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    variables = [f"HOME={home}", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "HF_HUB_OFFLINE=1"]
    return ["env", "-i", *variables, "bash", "-euo", "pipefail", "-c", script]


def run_in_fresh_shell(script: str, folder: Path, timeout: float = 200) -> str:
    """Run `script` in such a shell in `folder`, and return what it prints. It must end with 0."""
    ended = subprocess.run(
        fresh_shell(script, folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout}"
    return ended.stdout
