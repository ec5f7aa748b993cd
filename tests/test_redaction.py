"""Redaction of secrets, recognized by their position in a URL or by their value, in everything printed or recorded."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table
from small_run import REPOSITORY

from job import config as settings
from job import redaction, storage
from job.cli import main
from job.data.corpus import CorpusFile
from job.data.data_set_plan import make_plan
from job.data.fingerprint import Fingerprint, _names
from job.errors import UserError, one_line
from job.json_record import record_bytes
from job.model.generation import Sampling
from job.redaction import redacted, redacted_tree, secrets_of, source_name
from job.report import make_console
from job.runs.attempts import Attempts, note_failure
from job.runs.export import export_model

VALUE = "hs/7Q+planted=ü"
"""A secret that URLs, JSON and Python each spell differently."""


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the secrets that a test has made known."""
    monkeypatch.setattr(redaction, "_known", redaction._Known())
    yield


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret that an environment variable holds."""
    monkeypatch.setenv("HF_TOKEN", VALUE)
    return VALUE


# ---- By position ----


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://bob:hunter2@host/a?id=5", "https://***@host/a?id=5"),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("https://ghp_0123@host/a", "https://***@host/a"),
        ("https://bob:p@ss:w@host/a", "https://***@host/a"),
        ("https://bob:pa/s?s#w@host/a", "https://***@host/a"),
        ("http://127.0.0.1:8080/@user/a@b", "http://127.0.0.1:8080/@user/a@b"),
        ("http://[::1]:8080/a@b", "http://[::1]:8080/a@b"),
        ("https://host: write to a@b.c", "https://host: write to a@b.c"),
    ],
)
def test_user_and_password_are_removed_from_a_url(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(f"data.source: {url!r}: is not there") == f"data.source: {shown!r}: is not there"


SIGNED = {
    "Amazon": "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F2026&X-Amz-Date=2026&X-Amz-Expires=60"
    "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=abc&X-Amz-Signature=def",
    "Amazon, older": "AWSAccessKeyId=AKIA&Expires=1&Signature=abc%3D",
    "Azure": "sv=2022&ss=b&srt=o&sp=r&st=1&se=2&spr=https&sr=b&sig=abc%2B%3D",
    "Alibaba OSS": "OSSAccessKeyId=LTAI&Expires=1&Signature=abc&security-token=def",
    "Alibaba OSS, newer": "x-oss-signature-version=OSS4&x-oss-date=1&x-oss-credential=a&x-oss-signature=b",
    "Tencent COS": "q-sign-algorithm=sha1&q-ak=AKID&q-sign-time=1;2&q-key-time=1;2&q-header-list=host"
    "&q-url-param-list=&q-signature=abc&x-cos-security-token=def",
    "Huawei OBS": "AccessKeyId=a&Expires=1&Signature=b&x-obs-security-token=c",
    "Volcengine TOS": "X-Tos-Algorithm=TOS4&X-Tos-Credential=a&X-Tos-Signature=b",
    "Google": "X-Goog-Algorithm=GOOG4&X-Goog-Credential=a&X-Goog-Signature=b",
    "CloudFront": "Policy=abc&Signature=def&Key-Pair-Id=ghi",
    "Qiniu": "e=1451491200&token=a:b",
    "a token": "access_token=abc",
    "a key": "api-key=abc",
    "a password": "password=abc",
    "another's token": "X-Download-Token=abc",
}


@pytest.mark.parametrize("query", SIGNED.values(), ids=SIGNED)
def test_signature_is_removed_and_not_part_of_the_source_name(query: str) -> None:
    for whole in (f"id=5&{query}", f"{query}&id=5"):
        url = f"https://host/folder/a.jsonl?{whole}"
        assert redacted(f"read {url}: there is none") == "read https://host/folder/a.jsonl?id=5&***: there is none"
        assert source_name(url) == "/folder/a.jsonl?id=5"
    assert redacted(f"('https://host/a?{query}',)") == "('https://host/a?***',)"


@pytest.mark.parametrize(
    "query", ["id=5", "se=1&sp=2&sv=3", "e=7", "t=1&version=2", "keyword=a", "monkey=b", "a=1&&b=2"]
)
def test_other_parameters_stay_and_are_part_of_the_source_name(query: str) -> None:
    assert redacted(f"https://host/a?{query}") == f"https://host/a?{query}"
    assert source_name(f"https://host/a?{query}") == f"/a?{query.replace('&&', '&')}"


def test_redacting_twice_changes_nothing() -> None:
    for query in SIGNED.values():
        once = redacted(f"see https://bob:pw@host/a?id=5&{query}.")
        assert redacted(once) == once == "see https://***@host/a?id=5&***."


def test_url_inside_json_is_redacted() -> None:
    text = r'{"a":"https://host/?id=5\u0026Signature=abc","b":"https://host/?Signature=abc&amp;id=5"}'
    assert "abc" not in redacted(text)


# ---- By value ----


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "SWANLAB_API_KEY"),
        *("MODELSCOPE_API_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "OSS_ACCESS_KEY_SECRET", "COS_SECRETKEY"),
        *("TENCENTCLOUD_SECRET_ID", "HUAWEICLOUD_SDK_SK", "DB_PASSWORD", "MYSQL_PWD", "my_token", "TOKEN", "SECRET"),
    ],
)
def test_variable_name_marks_a_secret(name: str) -> None:
    assert secrets_of({name: VALUE}) == {VALUE: name}


def test_other_variables_are_not_secrets() -> None:
    environment = {
        "PWD": "/some/folder/that/is/long",
        "OLDPWD": "/some/folder/that/is/long",
        "TOKENIZERS_PARALLELISM": "false or true",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token",
        "GOOGLE_APPLICATION_CREDENTIALS": __file__,
        "SSH_AUTH_SOCK": "/tmp/agent.socket",
        "CI_TOKEN": "short",
    }
    assert secrets_of(environment) == {}


def test_environment_secret_is_found_in_every_spelling(in_environment: str) -> None:
    from urllib.parse import quote, quote_plus

    spelled = [VALUE, quote(VALUE), quote(VALUE, safe=""), quote_plus(VALUE), json.dumps(VALUE)[1:-1]]
    assert redacted(" | ".join(spelled)) == " | ".join(["***"] * len(spelled))


def test_each_line_of_a_multiline_secret_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNING_KEY", "first-line-of-it\nsecond-line-of-it\n")
    assert redacted("a second-line-of-it, first-line-of-it") == "a ***, ***"


def test_configuring_the_store_learns_a_changed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-first-secret")
    assert redacted("the-first-secret") == "***"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-second-secret")
    storage.configure(storage.StoreOptions())
    assert redacted("the-second-secret") == "***"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "PIP_INDEX_URL", "SOME_ADDRESS"])
def test_password_in_a_url_variable_is_found_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://somebody:pass%2Fword1@proxy:3128")
    assert redacted("refused: somebody pass/word1, pass%2Fword1, c29tZWJvZHk6cGFzcy93b3JkMQ==") == (
        "refused: somebody ***, ***, ***"
    )


def test_secrets_in_settings_urls_are_found_anywhere() -> None:
    settings.load(None, [("data.source", "https://somebody:password1@host/a?id=5&sig=signature%2B1&sp=read")])
    assert redacted("password1 or signature+1 may read id 5") == "*** or *** may read id 5"


def test_redacting_a_line_takes_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        monkeypatch.setenv(f"A{number}_TOKEN", f"secret/number+{number}")
    line = "step 280/565 | loss 6.2808 | lr 3.64e-03 | grad norm 0.731 | 10,153 tokens/s | data wait 0.6% | ETA 0:00:30"
    assert redacted(line) == line
    began = time.perf_counter()
    for _ in range(1000):
        redacted(line)
    assert time.perf_counter() - began < 0.2, "200 microseconds a line, which a busy machine does in 10"


# ---- Where text leaves the program ----

URL = "https://somebody:planted-password@host/a.jsonl?id=5&X-Amz-Signature=planted-signature"
PLANTED = "planted"
SHOWN = "https://***@host/a.jsonl?id=5&***"


def printed(program: str, **environment: str) -> str:
    """Return what a process prints on both streams after `console.install()`."""
    done = subprocess.run(
        [sys.executable, "-c", f"from job import console; console.install()\n{program}"],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "program",
    {
        "print": f"print({URL!r}, 'HF')",
        "standard error": f"import sys; sys.stderr.write({URL!r})",
        "lines": f"import sys; sys.stdout.writelines([{URL!r}])",
        "a warning": f"import warnings; warnings.warn({URL!r})",
        "logging": f"import logging; logging.getLogger('a').warning('failed: %s', {URL!r})",
        "logging an exception": f"import logging\ntry: 1 / 0\nexcept Exception: logging.exception({URL!r})",
        "a traceback": f"raise RuntimeError({URL!r})",
        "a traceback with a cause": f"try: raise OSError({URL!r})\nexcept OSError as e: raise RuntimeError('x') from e",
        "a thread's traceback": f"def fail(): raise RuntimeError({URL!r})\n"
        "import threading; thread = threading.Thread(target=fail); thread.start(); thread.join()",
        "the end": f"import sys; sys.exit({URL!r})",
    }.values(),
)
def test_everything_printed_is_redacted(program: str) -> None:
    told = printed(program)
    assert SHOWN in told
    assert PLANTED not in told.replace(f"({URL!r})", "").replace(f"'failed: %s', {URL!r}", "")


def test_environment_secret_is_not_printed() -> None:
    assert printed("import os; print('it is', os.environ['HF_TOKEN'])", HF_TOKEN="planted-token") == "it is ***\n"


def test_table_shows_no_half_secret_at_a_line_break() -> None:
    table = Table()
    table.add_row("data.source", URL)
    console = make_console(file=io.StringIO(), force_terminal=False)
    console.width = 60
    console.print(table)
    assert PLANTED not in console.file.getvalue().replace("\n", "").replace(" ", "").replace("│", "")  # type: ignore[attr-defined]


def test_cut_error_shows_no_half_secret() -> None:
    long = f"https://somebody:{'planted' * 60}@host/a"
    assert PLANTED not in str(UserError("data.source", long, "is not there"))
    assert PLANTED not in one_line(long)[:200]


def test_error_from_another_process_has_no_secret() -> None:
    import pickle

    error = UserError("data.source", URL, f"{URL} is not there", f"correct {URL}")
    assert (
        str(pickle.loads(pickle.dumps(error)))
        == str(error)
        == (f"data.source: '{SHOWN}': {SHOWN} is not there; correct {SHOWN}")
    )


@dataclass(frozen=True)
class Record:
    """Something that is stored."""

    number: int
    texts: list[str]
    tree: dict[str, Any]


def test_record_has_no_secret_and_keeps_its_numbers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "12345678")
    record = Record(12345678, [URL, "12345678"], {"a": {"b": (URL, None, 1.5)}})
    expected = {"number": 12345678, "texts": [SHOWN, "***"], "tree": {"a": {"b": [SHOWN, None, 1.5]}}}
    assert json.loads(record_bytes(record)) == expected
    storage.write_json(str(tmp_path / "a.json"), {"url": URL})
    assert json.loads((tmp_path / "a.json").read_text()) == {"url": SHOWN}


def test_attempt_record_has_no_secret(tmp_path: Any) -> None:
    attempts = Attempts(str(tmp_path))
    attempt = attempts.claim("run", "a-start", None, resume=URL)
    cut_inside = f"RuntimeError: {URL}-{PLANTED}{'.' * 1990}"
    note_failure(str(tmp_path), "a-start", cut_inside)
    attempts.give_up(cut_inside)
    for path in (tmp_path / "attempts").iterdir():
        assert json.loads(path.read_text())["error"].endswith("...")
        assert PLANTED not in path.read_text()
    assert attempt.resume == URL


def test_model_card_has_no_secret(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.runs import export

    for name in ("write_model", "write_tokenizer", "tokenizer_mismatch"):  # Leave out the other files, and their check.
        monkeypatch.setattr(export, name, lambda *_, **__: None)
    nothing: Any = SimpleNamespace(vocab_size=1, eod_id=1, architecture="qwen2", model_type="qwen2", texts=[])
    sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=1.0, seed=0)
    card = f"pretrained on `{URL}`"
    export_model(str(tmp_path / "final"), nothing, {}, nothing, 32, card, nothing, sampling)
    assert (tmp_path / "final" / "README.md").read_text() == f"pretrained on `{SHOWN}`"


def test_recorded_and_printed_settings_have_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    config = settings.load(None, [("data.source", URL)])
    assert config.data.source == URL, "the run itself needs the real URL"
    assert settings.to_dict(config)["data"]["source"] == SHOWN
    assert main(["train", "--print-config", "--data.source", URL]) == 0
    told = capsys.readouterr().out
    assert f"source: {SHOWN}\n" in told and PLANTED not in told


def test_slurm_log_shows_the_command_without_secrets() -> None:
    script = (REPOSITORY / "launch" / "slurm.sh").read_text()
    (function,) = [line for line in script.splitlines() if line.startswith("without_secrets() ")]
    words = ["train", "configs/mine.yaml", "--data.source", URL, "--train.epochs", "1"]
    program = ["bash", "-c", f'{function}\nwithout_secrets "$@"', "bash", *words]
    printed = subprocess.run(program, capture_output=True, text=True).stdout
    assert printed == "train configs/mine.yaml --data.source https://***@host/a.jsonl?*** --train.epochs 1\n"
    assert 'say "start' in script and '$(without_secrets "$command" "$config" "$@")' in script


# ---- The same URL with a new signature ----


def signed_url(number: int) -> str:
    return f"https://user:password-{number}@host/wiki/a.jsonl?id=5&X-Amz-Date={number}&X-Amz-Signature=sig-{number}"


def test_new_signature_is_not_a_changed_setting() -> None:
    first, second = (settings.to_dict(settings.load(None, [("data.source", signed_url(n))])) for n in (1, 2))
    assert first == second
    assert first != settings.to_dict(settings.load(None, [("data.source", signed_url(1).replace("id=5", "id=6"))]))


def test_new_signature_is_the_same_source_in_the_plan() -> None:
    def plan(url: str) -> bytes:
        (name,) = _names([CorpusFile(0, url, url, 10, "json", None)])
        source = (Fingerprint(name=name, size=10, sha256="0"),)
        return make_plan(source, {"data.source": url}).content

    url = signed_url(1)
    assert _names([CorpusFile(0, url, url, 10, "json", None)]) == ["a.jsonl?id=5"], (
        "the name must not contain the signature"
    )
    assert plan(signed_url(1)) == plan(signed_url(2))
    assert plan(signed_url(1)) != plan(signed_url(1).replace("id=5", "id=6"))
    assert b"password" not in plan(signed_url(1)) and b"sig-1" not in plan(signed_url(1))


def test_plan_does_not_depend_on_local_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Fingerprint(name="wikipedia-zh.jsonl", size=10, sha256="0"),)
    named: dict[str, str | int | float] = {"data.text_field": "wikipedia-zh"}
    before = make_plan(source, named).content
    monkeypatch.setenv("DB_PASSWORD", "wikipedia-zh")
    redaction.learn_environment()
    assert redacted("wikipedia-zh") == "***"
    assert make_plan(source, named).content == before


def test_run_resumes_from_a_checkpoint_url_with_a_new_signature(tmp_path: Any) -> None:
    from job.runs.launch_context import LaunchContext
    from job.runs.resume import _resumed_since

    attempts = Attempts(str(tmp_path))
    attempt = attempts.claim("run", "a-start", None, resume=signed_url(1))
    attempts.update(type(attempt)(**{**vars(attempt), "from_step": 3}))
    start = LaunchContext("another", 0.0, None, None, lambda: False, lambda line: None, "cpu", "a test")
    assert _resumed_since(Attempts(str(tmp_path)), signed_url(2), start) == attempt.number


def test_redacted_tree_keeps_its_shape() -> None:
    tree = {"a": [1, None, True, {"b": URL}], URL: 1.5}
    assert redacted_tree(tree) == {"a": [1, None, True, {"b": SHOWN}], SHOWN: 1.5}
