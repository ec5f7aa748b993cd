"""Test which settings file launch/slurm.sh uses, with stand-ins for Slurm's programs."""

from pathlib import Path

from stand_ins import Site


def node_command(site: Site, *words: str, **variables: str) -> str:
    """Return the command that the script runs on a node."""
    site.log.unlink(missing_ok=True)
    assert site.run(*words, **variables) == 0, site.lines
    first_line, command = site.lines[0], site.lines[-1]
    _, _, name, _, config, *_ = command.split()
    assert f": {name} {config}" in first_line, "the first line names the file"
    return command


def test_script_uses_the_same_settings_file_as_the_program(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert node_command(site) == "-m job train --config configs/wiki-123m.yaml"
    assert node_command(site, JOB_CONFIG="") == "-m job train --config configs/wiki-123m.yaml"
    (tmp_path / "job.yaml").touch()
    assert node_command(site, "prepare") == "-m job prepare --config job.yaml"
    assert node_command(site, JOB_CONFIG="other.yaml") == "-m job train --config other.yaml"
    words = ("configs/wiki-123m.yaml", "--train.seed", "3")
    assert node_command(site, *words, JOB_CONFIG="other.yaml") == f"-m job train --config {' '.join(words)}"
