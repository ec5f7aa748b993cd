"""Which file of settings launch/slurm.sh takes, with stand-ins for Slurm's programs."""

from pathlib import Path

from stand_ins import Site


def taken(site: Site, *words: str, **variables: str) -> str:
    """The command that the script runs on a node."""
    site.log.unlink(missing_ok=True)
    assert site.run(*words, **variables) == 0, site.lines
    said, command = site.lines[0], site.lines[-1]
    _, _, name, _, config, *_ = command.split()
    assert f": {name} {config}" in said, "it says which file it takes"
    return command


def test_the_script_takes_the_file_that_the_program_would(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert taken(site) == "-m job train --config configs/wiki-123m.yaml"
    assert taken(site, JOB_CONFIG="") == "-m job train --config configs/wiki-123m.yaml"
    (tmp_path / "job.yaml").touch()
    assert taken(site, "prepare") == "-m job prepare --config job.yaml"
    assert taken(site, JOB_CONFIG="other.yaml") == "-m job train --config other.yaml"
    words = ("configs/wiki-123m.yaml", "--train.seed", "3")
    assert taken(site, *words, JOB_CONFIG="other.yaml") == f"-m job train --config {' '.join(words)}"
