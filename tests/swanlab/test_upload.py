"""Tests of `upload`: a data set arrives complete or is marked as failed, and no other files are sent."""

import hashlib
import json
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from launched import Launch
from service import SwanLab

from job.data.manifest import Manifest, Shard, ShardBuilder, manifest_bytes
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED
from launch.swanlab import cos
from launch.swanlab.cos import CodeStore

RECORD = json.dumps({"id": "1", "text": "一篇文章"}, ensure_ascii=False).encode() + b"\n"
PRIVATE = b"aws_secret_access_key = a-secret"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A prepared data set with one shard."""
    folder = tmp_path / "shards"
    (folder / "train").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    builder = ShardBuilder("uint16")
    builder.add(np.arange(500, dtype=np.uint16), np.array([200, 300]))
    content = bytes(builder.finish())
    (folder / "train" / "00000.bin").write_bytes(content)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    shard = Shard(
        name="train/00000.bin",
        tokens=500,
        documents=2,
        utf8_bytes=1,
        characters=1,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    manifest = Manifest(
        fingerprint="",
        tokenizer_fingerprint="",
        vocab_size=500,
        dtype="uint16",
        eod_id=0,
        seed=0,
        validation_fraction=0,
        split_rule="",
        train=(shard,),
        validation=(),
        statistics={},
    )
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    return folder


def read_files(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def uploaded(swanlab: SwanLab) -> dict[str, bytes]:
    """Return the contents of the uploaded data set by path."""
    ((cuid, data_set),) = swanlab.data_sets.items()
    prefix = f"datasets/{cuid}/{data_set['name']}/"
    return {name.removeprefix(prefix): content for name, content in swanlab.objects("datasets").items()}


def test_folder_is_uploaded_under_the_data_set_name(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    result = launch("upload", str(shards), "--name", "WIKI_CN")
    assert result.code == EXIT_DONE, result.err
    ((cuid, data_set),) = swanlab.data_sets.items()
    assert data_set == {"name": "WIKI_CN", "status": "SUCCESS"}
    assert uploaded(swanlab) == read_files(shards, "manifest.json", "train/00000.bin", "tokenizer/tokenizer.json")
    assert f"id: {cuid}" in result.out and "--data.shards /data/WIKI_CN" in result.out


def test_large_file_is_uploaded_in_parts(
    swanlab: SwanLab, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "PART_BYTES", 5 * 2**20)
    content = RECORD * (12 * 2**20 // len(RECORD))
    (tmp_path / "wiki.json").write_bytes(content)
    assert launch("upload", str(tmp_path / "wiki.json")).code == EXIT_DONE
    (cuid,) = swanlab.data_sets
    assert swanlab.objects("datasets") == {f"datasets/{cuid}/wiki.json/wiki.json": content}


def test_failed_upload_is_reported_and_can_be_resumed(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, tried = CodeStore.upload, []

    def fail_at_second_file(self: CodeStore, file: Path, path: str) -> None:
        tried.append(file.name)
        if len(tried) == 2:
            monkeypatch.setattr(self, "_bucket", "no-such-bucket")
            monkeypatch.setattr(self, "_renew", lambda: None)
        upload(self, file, path)

    monkeypatch.setattr(CodeStore, "upload", fail_at_second_file)
    result = launch("upload", str(shards), "--name", "WIKI_CN")
    (cuid,) = swanlab.data_sets
    assert (result.code, result.err.count("\n")) == (EXIT_FAILED, 1)
    assert result.err.endswith(f"; to continue the upload, add --resume {cuid}\n")
    assert swanlab.data_sets[cuid]["status"] == "FAILURE"
    assert len(swanlab.objects("datasets")) == 1

    result = launch("upload", str(shards), "--name", "WIKI_CN", "--resume", cuid)
    assert result.code == EXIT_DONE, result.err
    assert tried == ["manifest.json", "tokenizer.json", "tokenizer.json", "00000.bin"]
    assert swanlab.data_sets == {cuid: {"name": "WIKI_CN", "status": "SUCCESS"}}
    assert len(uploaded(swanlab)) == 3


def test_file_with_another_size_is_sent_again(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    launch("upload", str(shards), "--name", "WIKI_CN")
    (cuid,) = swanlab.data_sets
    changed = (shards / "manifest.json").read_bytes() + b"\n"
    (shards / "manifest.json").write_bytes(changed)
    result = launch("upload", str(shards), "--name", "WIKI_CN", "--resume", cuid)
    assert "00000.bin: already uploaded" in result.out
    assert uploaded(swanlab)["manifest.json"] == changed


def test_expired_keys_are_renewed(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "_FRESH_SECONDS", -1)
    assert launch("upload", str(shards)).code == EXIT_DONE
    assert swanlab.store_keys_given == 4


def test_invalid_data_set_is_refused_before_anything_is_sent(
    swanlab: SwanLab, launch: Launch, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        (str(tmp_path / "nothing"),): "upload: ",
        (str(tmp_path / "empty"),): "upload: ",
        (str(shards), "--name", "a/b"): "--name: 'a/b': expected 1 to 100 letters",
        (str(shards), "--resume", "abcdef"): (
            "--resume: 'abcdef': you have no data set with this id and the name shards"
        ),
    }
    for words, line in cases.items():
        result = launch("upload", *words)
        assert (result.code, result.err.count("\n")) == (EXIT_REFUSED, 1)
        assert result.err.startswith(line)
    assert not swanlab.data_sets


# ---- Which files are sent ----


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with private files, outside the uploaded folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "credentials").write_bytes(PRIVATE)
    (folder / "notes.jsonl").write_bytes(RECORD)
    return folder


@pytest.fixture
def corpus(tmp_path: Path, elsewhere: Path) -> Path:
    """A folder with three corpus files, and many files that a home folder contains."""
    folder = tmp_path / "corpus"
    for path, content in {
        "a.jsonl": RECORD,
        "part/b.json": b"[" + RECORD + b"]",
        "c.jsonl.gz": b"\x1f\x8b",
        ".aws/credentials": PRIVATE,
        ".git/config": PRIVATE,
        ".bash_history": PRIVATE,
        ".ipynb_checkpoints/a.jsonl": RECORD,
        "_old/a.jsonl": RECORD,
        "notes.txt": PRIVATE,
        "id_rsa": PRIVATE,
        "credentials.json": RECORD,
        "settings.json": b'{"a": {"b": 1}}',
        "account.jsonl": b'{"text": "-----BEGIN PRIVATE KEY-----"}',
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "linked.jsonl").symlink_to(elsewhere / "notes.jsonl")
    (folder / "inside.jsonl").symlink_to("a.jsonl")
    (folder / "hidden.jsonl").symlink_to(".ipynb_checkpoints/a.jsonl")
    (folder / "home").symlink_to(elsewhere)
    (folder / "broken.jsonl").symlink_to("nothing.jsonl")
    return folder


def test_only_corpus_files_are_sent(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    assert launch("upload", str(corpus)).code == EXIT_DONE
    assert uploaded(swanlab) == read_files(corpus, "a.jsonl", "part/b.json", "c.jsonl.gz", "inside.jsonl")


def test_excluded_files_are_printed_with_reasons(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    result = launch("upload", str(corpus)).out
    reasons = dict(re.findall(r"^not sent: (\S+) \((.*)\)$", result, re.MULTILINE))
    assert reasons == {
        ".aws": "hidden",
        ".bash_history": "hidden",
        ".git": "hidden",
        ".ipynb_checkpoints": "hidden",
        "_old": "hidden",
        "account.jsonl": "a file whose line 1 looks like a private key",
        "broken.jsonl": "not a file",
        "credentials.json": "a file that holds secrets, judging by its name",
        "hidden.jsonl": "a link to something hidden",
        "home": "a link that leads out of the folder",
        "id_rsa": "a file that holds secrets, judging by its name",
        "linked.jsonl": "a link that leads out of the folder",
        "notes.txt": "not a corpus file, judging by its name",
        "settings.json": "not a corpus file: it holds no JSON objects with a text value",
    }


def test_long_list_of_excluded_files_is_summarized(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    for number in range(40):
        (corpus / f"z{number}.txt").touch()
    result = launch("upload", str(corpus)).out
    assert result.count("not sent: ") == 21
    assert "more (not a corpus file, judging by its name)" in result


def test_only_files_in_the_manifest_are_sent(swanlab: SwanLab, launch: Launch, shards: Path, elsewhere: Path) -> None:
    (shards / "wiki.jsonl").write_bytes(RECORD)
    (shards / "tokenizer" / "notes.txt").write_bytes(PRIVATE)
    (shards / "tokenizer" / "vocab.json").symlink_to(elsewhere / "credentials")
    (shards / ".env").write_bytes(PRIVATE)
    result = launch("upload", str(shards))
    assert result.code == EXIT_DONE, result.err
    assert set(uploaded(swanlab)) == {"manifest.json", "train/00000.bin", "tokenizer/tokenizer.json"}
    assert "not sent: wiki.jsonl (not part of the data set: manifest.json does not list it)" in result.out
    assert "not sent: tokenizer/vocab.json (a link that leads out of the folder)" in result.out


def test_incomplete_data_set_is_not_sent(swanlab: SwanLab, launch: Launch, shards: Path, elsewhere: Path) -> None:
    shard = shards / "train" / "00000.bin"
    shard.rename(elsewhere / "00000.bin")
    assert f"upload: '{shard}': belongs to the data set and is missing" in launch("upload", str(shards)).err
    shard.symlink_to(elsewhere / "00000.bin")
    assert "belongs to the data set and is a link that leads out" in launch("upload", str(shards)).err
    shard.unlink()
    shard.write_bytes(b"x")
    assert "has 1 bytes, but manifest.json says" in launch("upload", str(shards)).err
    assert not swanlab.data_sets


def test_single_file_that_is_not_a_corpus_is_refused(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    for name in ("credentials.json", ".bash_history", "notes.txt", "settings.json", "account.jsonl"):
        result = launch("upload", str(corpus / name))
        assert (result.code, result.err.count("\n")) == (EXIT_REFUSED, 1)
        assert f"upload: '{corpus / name}': is not sent: it is " in result.err
    assert not swanlab.data_sets


def test_store_requests_use_bucket_host_and_session_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """COS needs both, but the tests' S3 server does not, so a proxy records the request."""
    request_lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection, connection.makefile("rb") as request:
                while (line := request.readline().strip().decode()) != "":
                    request_lines.append(line)
                connection.sendall(b"HTTP/1.1 200 OK\r\netag: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(cos, "ENDPOINT", cos.ENDPOINT.replace("https", "http"))
        keys = {"tmpSecretId": "id", "tmpSecretKey": "key", "sessionToken": "the-token"}
        keys_answer = {"region": "ap-beijing", "bucket": "swanlab-125", "prefix": "codes/7"}
        CodeStore(lambda: keys_answer | {"credentials": keys}).write("tasks/1.zip", b"zip")
        thread.join(timeout=30)
    assert request_lines[0].startswith("PUT http://swanlab-125.cos.ap-beijing.myqcloud.com/codes/7/tasks/1.zip ")
    assert "x-amz-security-token: the-token" in [line.lower() for line in request_lines]
