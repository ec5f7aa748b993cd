"""What `job check` prints besides mistakes: the plan, warnings, the command to run; and what it must not do."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import yaml
from preflight_workspace import HERE, KUBERNETES, MULTI_NODE, SLURM, SWANLAB, Workspace, gpu, marks
from small_run import REPOSITORY

from job import config as settings
from job import storage
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.preflight.check import check, preflight
from job.preflight.findings import RIGHT, UNSURE, WRONG
from job.runs.attempts import Attempts

PYTHON = sys.executable
"""The interpreter as it is printed, because it is not below the working directory of these tests."""


# ---- What is printed ----


def test_check_says_what_to_do_first_without_data_and_gpu(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.set(data__shards=f"{workspace.bucket}/none", data__source=str(SAMPLE))
    assert check(workspace.config, config_path="mine.yaml") == EXIT_REFUSED
    shown = capsys.readouterr().out
    assert re.search(rf"^✗ +data set .* run `{PYTHON} -m job prepare` first *$", shown, re.MULTILINE)
    assert re.search(r"^✓ +corpus +1 file", shown, re.MULTILINE)
    assert re.search(r"^! +GPUs +none", shown, re.MULTILINE)
    assert shown.endswith(f"correct the rows marked ✗, then run it: {PYTHON} -m job train --config mine.yaml\n")


def test_plan_before_prepare_is_of_the_corpus_and_says_so(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample in the store has the tokens of the data set that was made of it, 60 % of them for training."""
    corpus = f"{workspace.bucket}/corpus/wiki.jsonl"
    storage.write_bytes(corpus, SAMPLE.read_bytes())
    workspace.set(data__source=corpus, tokenizer__source=f"{workspace.data.shards}/tokenizer",
                  data__validation_fraction=0.4, train__epochs=1)  # fmt: skip
    tokens = sum(shard.tokens for shard in workspace.data.manifest.train + workspace.data.manifest.validation)
    workspace.set(data__shards=f"{workspace.bucket}/none")
    result = preflight(workspace.config)
    assert result.work is not None and result.work.tokens == pytest.approx(0.6 * tokens, rel=0.01)
    assert result.model is not None and result.model.vocab_size == workspace.data.manifest.vocab_size
    assert check(workspace.config) == EXIT_REFUSED
    shown = capsys.readouterr().out
    assert re.search(r"^the run, assumed *$", shown, re.MULTILINE)
    assert re.search(
        r"^assumed: 0\.\d\d bytes of text for each byte of the corpus, as in its first", shown, re.MULTILINE
    )
    assert re.search(r"^assumed: .* per token, .*; `prepare` gives the real number$", shown, re.MULTILINE)
    assert re.search(r"^T4 +15 +fp16 +\d+% +[\d,]+ ", shown, re.MULTILINE)


@pytest.mark.parametrize("preset", ["wiki-54m", "wiki-110m", "wiki-123m"])
def test_plan_of_a_preset_needs_no_download_and_is_as_in_the_readme(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    config = settings.load(str(REPOSITORY / "configs" / f"{preset}.yaml"))
    assert check(config) == EXIT_REFUSED, "there is no data set yet"
    shown = capsys.readouterr().out
    assert "assumed: 1.56 GB of text, as fjcanyue/wikipedia-zh-cn had in 2024; `prepare` gives the real" in shown
    assert re.search(r"^evaluation +[\d,]+ tokens, [1-3]% of the FLOPs", shown, re.MULTILINE)
    (row,) = [
        line for line in (REPOSITORY / "README.md").read_text().splitlines() if f"`configs/{preset}.yaml` |" in line
    ]
    in_readme = [float(cell.split(" h")[0]) for cell in row.split("|")[4:9]]
    in_plan = [float(re.search(rf"^{gpu} .*%\D+[\d,]+ +([\d.]+)", shown, re.MULTILINE)[1])
               for gpu in ("T4", "RTX 3090", "RTX 4090", "A100", "H100")]  # fmt: skip
    assert in_plan == pytest.approx(in_readme, rel=0.05, abs=0.1), "which leaves evaluations out"


def test_plan_of_an_unknown_corpus_on_a_hub_is_left_out(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.set(data__source="owner/name", data__shards=f"{workspace.bucket}/none")
    assert check(workspace.config) == EXIT_REFUSED
    shown = capsys.readouterr().out
    assert "assumed:" not in shown
    assert re.search(
        r"^! +corpus +owner/name is on a hub; .*after `prepare`, the plan has the real numbers", shown, re.M
    )


def test_slice_of_a_gpu_gets_no_hours_of_the_whole_gpu(workspace: Workspace) -> None:
    line = gpu(name="NVIDIA A100-SXM4-80GB", mib=81920, capability="8.0")
    for mode, name in (("Disabled", "NVIDIA A100-SXM4-80GB"), ("Enabled", "")):
        workspace.nvidia_smi(line.replace("[N/A]", mode))
        target = preflight(workspace.config).target
        assert target is not None and target.gpu_name == name


@pytest.mark.parametrize(
    ("combo", "name", "capability"),
    [("H800-1", "NVIDIA H800", (9, 0)), ("RTX3090-1", "NVIDIA GeForce RTX 3090", (8, 6))],
)
def test_gpu_of_a_swanlab_task_decides_precision_and_micro_batch(
    workspace: Workspace, combo: str, name: str, capability: tuple[int, int]
) -> None:
    workspace.edit("swanlab.yaml", "combo: .*", f"combo: {combo}")
    workspace.set(train__precision="auto")
    result = preflight(workspace.config, SWANLAB)
    assert result.target is not None
    assert (result.target.gpu_name, result.target.gpu_capability) == (name, capability)
    (precision,) = [row for row in result.findings.rows if row.name == "precision"]
    assert name in precision.found and precision.found.startswith("bf16")


def test_job_that_makes_the_data_set_needs_only_the_corpus(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.set(data__shards=f"{workspace.bucket}/none", data__source=str(SAMPLE))
    place = "kubernetes/prepare"
    assert check(workspace.config, place) == EXIT_DONE
    shown = capsys.readouterr().out
    shards = re.escape(workspace.config.data.shards)
    assert re.search(rf"^✓ +data set +{shards}: none yet; the Job of {place} makes it *$", shown, re.MULTILINE)
    assert re.search(r"^✓ +corpus +1 file", shown, re.MULTILINE)
    assert shown.endswith("run it: kubectl apply -k launch/kubernetes/prepare\n")


def test_plan_names_its_assumptions_and_uses_given_values(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(workspace.config, mfu=0.4, price_per_gpu_hour=7.25, config_path="mine.yaml") == EXIT_DONE
    shown = capsys.readouterr().out
    for name in ("A100", "H100", "T4", "RTX 4090 D"):
        assert re.search(rf"^{name} +\S+ +\S+ +40% .* 7\.25 ", shown, re.MULTILINE)
    assert "parameters" in shown and "FLOPs per token" in shown
    assert shown.endswith(f"run it: {PYTHON} -m job train --config mine.yaml\n")
    assert check(workspace.config) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "the run, assumed" not in shown
    assert "MFU: assumed from the model's size" in shown and "2026, assumed;" in shown


TYPED = "--train.seed 3 --generate.prompts '[\"a b\"]' --run.name http://***@h"


@pytest.mark.parametrize(
    ("place", "command"),
    [
        (HERE, f"{PYTHON} -m job train --config mine.yaml {TYPED}"),
        (SLURM, f"sbatch launch/slurm.sh mine.yaml {TYPED}"),
        (MULTI_NODE, "kubectl apply -k launch/kubernetes/multi-node"),
        (SWANLAB, f"{PYTHON} -m launch.swanlab submit --config mine.yaml {TYPED} --until-done --with-cred"),
    ],
)
def test_last_line_is_the_command_that_starts_the_run(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], place: str | None, command: str
) -> None:
    typed = [("train.seed", "3"), ("generate.prompts", '["a b"]'), ("run.name", "http://me:hunter2@h")]
    assert check(workspace.config, place, config_path="mine.yaml", overrides=typed) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"run it: {command}")


def test_unknown_place_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--place: 'moon'"):
        check(workspace.config, "moon")


# ---- Existing runs ----


def test_plan_of_existing_run_uses_its_step_and_measured_rate(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.begin_run(step=10)
    assert marks(workspace.rows(HERE), "run") == [RIGHT]
    check(workspace.config)
    assert re.search(r"measured in this run +1,000 ", capsys.readouterr().out)
    workspace.set(train__resume="never")
    assert marks(workspace.rows(HERE), "run") == [UNSURE]


def test_run_of_another_model_shows_the_sizes_that_differ(workspace: Workspace) -> None:
    workspace.begin_run()
    workspace.set(model__intermediate_size=64, train__warmup_steps=100_000)
    rows = workspace.rows(HERE)
    (run,) = [row for row in rows if row.name == "run"]
    assert "model.intermediate_size was 48, is 64" in run.found and "hidden_size" not in run.found
    assert UNSURE in marks(rows, "schedule"), "the rules of `train` are among the rows"


def test_attempt_that_may_still_run_is_only_a_warning(workspace: Workspace) -> None:
    workspace.begin_run()
    attempts = Attempts(workspace.config.run.output)
    newest = attempts.newest()
    assert newest is not None
    attempts.update(dataclasses.replace(newest, ended=None))
    assert marks(workspace.rows(HERE), "run") == [UNSURE]


# ---- Credentials and secrets ----


def test_missing_credentials_are_a_warning_for_another_place(workspace: Workspace) -> None:
    workspace.environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true",
                          HOME=str(workspace.folder))  # fmt: skip
    rows = workspace.rows(SLURM)
    assert marks(rows, "credentials") == [UNSURE]
    assert WRONG not in [row.mark for row in rows]


def test_signed_url_in_config_map_is_named_but_not_shown(workspace: Workspace) -> None:
    workspace.set(data__source="https://host/wiki.jsonl?X-Amz-Signature=planted")
    rows = workspace.rows(KUBERNETES)
    assert marks(rows, "secrets") == [UNSURE, RIGHT]
    assert "planted" not in str(rows) and "data.source: the URL has a password or signature" in str(rows)


def test_check_leaves_no_file_behind_and_shows_no_secret(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = workspace.folder / "a" / "run"
    for output in (f"{workspace.bucket}/run", str(outside)):
        workspace.set(run__output=output)
        check(workspace.config, deep=True)
    assert storage.list_files(workspace.bucket) == []
    assert not outside.parent.exists()
    shown = capsys.readouterr().out
    assert "AWS_SECRET_ACCESS_KEY" in shown
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "SWANLAB_API_KEY"):
        assert os.environ[name] not in shown


# ---- Speed ----


def test_check_does_not_import_slow_libraries(workspace: Workspace) -> None:
    workspace.begin_run()
    (workspace.folder / "mine.yaml").write_text(yaml.safe_dump(workspace.tree))
    program = (
        "import sys; from job import config; from job.preflight.check import check\n"
        "assert check(config.load('mine.yaml')) == 0\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
