"""A data set's way into SwanLab's store: whole or said to have failed, and nothing that does not belong to it."""

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
    """A prepared data set of one shard."""
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


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def sent(swanlab: SwanLab) -> dict[str, bytes]:
    """The files of the one data set that was sent, by their paths in it."""
    ((cuid, data_set),) = swanlab.data_sets.items()
    prefix = f"datasets/{cuid}/{data_set['name']}/"
    return {name.removeprefix(prefix): content for name, content in swanlab.objects("datasets").items()}


def test_a_folder_arrives_under_the_name_of_the_data_set(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    said = launch("upload", str(shards), "--name", "WIKI_CN")
    assert said.code == EXIT_DONE, said.err
    ((cuid, data_set),) = swanlab.data_sets.items()
    assert data_set == {"name": "WIKI_CN", "status": "SUCCESS"}
    assert sent(swanlab) == contents(shards, "manifest.json", "train/00000.bin", "tokenizer/tokenizer.json")
    assert f"id: {cuid}" in said.out and "--data.shards /data/WIKI_CN" in said.out


def test_a_large_file_arrives_in_parts(
    swanlab: SwanLab, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "PART_BYTES", 5 * 2**20)
    content = RECORD * (12 * 2**20 // len(RECORD))
    (tmp_path / "wiki.json").write_bytes(content)
    assert launch("upload", str(tmp_path / "wiki.json")).code == EXIT_DONE
    (cuid,) = swanlab.data_sets
    assert swanlab.objects("datasets") == {f"datasets/{cuid}/wiki.json/wiki.json": content}


def test_what_fails_is_told_to_the_service_and_gone_on_with(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, tried = CodeStore.upload, []

    def fails_at_the_second(self: CodeStore, file: Path, path: str) -> None:
        tried.append(file.name)
        if len(tried) == 2:
            monkeypatch.setattr(self, "_bucket", "no-such-bucket")
            monkeypatch.setattr(self, "_renew", lambda: None)
        upload(self, file, path)

    monkeypatch.setattr(CodeStore, "upload", fails_at_the_second)
    said = launch("upload", str(shards), "--name", "WIKI_CN")
    (cuid,) = swanlab.data_sets
    assert (said.code, said.err.count("\n")) == (EXIT_FAILED, 1)
    assert said.err.endswith(f"; go on with --resume {cuid}\n")
    assert swanlab.data_sets[cuid]["status"] == "FAILURE"
    assert len(swanlab.objects("datasets")) == 1

    said = launch("upload", str(shards), "--name", "WIKI_CN", "--resume", cuid)
    assert said.code == EXIT_DONE, said.err
    assert tried == ["manifest.json", "tokenizer.json", "tokenizer.json", "00000.bin"]
    assert swanlab.data_sets == {cuid: {"name": "WIKI_CN", "status": "SUCCESS"}}
    assert len(sent(swanlab)) == 3


def test_a_file_of_another_size_is_sent_again(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    launch("upload", str(shards), "--name", "WIKI_CN")
    (cuid,) = swanlab.data_sets
    changed = (shards / "manifest.json").read_bytes() + b"\n"
    (shards / "manifest.json").write_bytes(changed)
    said = launch("upload", str(shards), "--name", "WIKI_CN", "--resume", cuid)
    assert "00000.bin: is there" in said.out
    assert sent(swanlab)["manifest.json"] == changed


def test_keys_that_have_ended_are_replaced(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "_FRESH_SECONDS", -1)
    assert launch("upload", str(shards)).code == EXIT_DONE
    assert swanlab.store_keys_given == 4


def test_what_cannot_be_a_data_set_is_refused_before_anything_is_sent(
    swanlab: SwanLab, launch: Launch, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        (str(tmp_path / "nothing"),): "upload: ",
        (str(tmp_path / "empty"),): "upload: ",
        (str(shards), "--name", "a/b"): "--name: 'a/b': expected letters",
        (str(shards), "--resume", "abcdef"): "--resume: 'abcdef': is no data set called shards",
    }
    for words, line in cases.items():
        said = launch("upload", *words)
        assert (said.code, said.err.count("\n")) == (EXIT_REFUSED, 1)
        assert said.err.startswith(line)
    assert not swanlab.data_sets


# ---- What is sent, and nothing else ----


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Files that are nobody's business, outside of what is uploaded."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "credentials").write_bytes(PRIVATE)
    (folder / "notes.jsonl").write_bytes(RECORD)
    return folder


@pytest.fixture
def corpus(tmp_path: Path, elsewhere: Path) -> Path:
    """A folder with three corpus files, among all that a home folder has."""
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
    assert sent(swanlab) == contents(corpus, "a.jsonl", "part/b.json", "c.jsonl.gz", "inside.jsonl")


def test_what_is_left_out_is_said_with_its_reason(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    said = launch("upload", str(corpus)).out
    reasons = dict(re.findall(r"^not sent: (\S+) \((.*)\)$", said, re.MULTILINE))
    assert reasons == {
        ".aws": "hidden",
        ".bash_history": "hidden",
        ".git": "hidden",
        ".ipynb_checkpoints": "hidden",
        "_old": "hidden",
        "account.jsonl": "a file whose line 1 looks like a private key",
        "broken.jsonl": "no file",
        "credentials.json": "a file whose name says that it holds secrets",
        "hidden.jsonl": "a link to something hidden",
        "home": "a link that leads out of the folder",
        "id_rsa": "a file whose name says that it holds secrets",
        "linked.jsonl": "a link that leads out of the folder",
        "notes.txt": "no corpus file by its name",
        "settings.json": "no corpus file: it does not hold JSON objects with a text in them",
    }


def test_of_many_files_left_out_the_rest_is_counted(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    for number in range(40):
        (corpus / f"z{number}.txt").touch()
    said = launch("upload", str(corpus)).out
    assert said.count("not sent: ") == 21
    assert "more (no corpus file by its name)" in said


def test_of_a_data_set_only_its_parts_are_sent(swanlab: SwanLab, launch: Launch, shards: Path, elsewhere: Path) -> None:
    (shards / "wiki.jsonl").write_bytes(RECORD)
    (shards / "tokenizer" / "notes.txt").write_bytes(PRIVATE)
    (shards / "tokenizer" / "vocab.json").symlink_to(elsewhere / "credentials")
    (shards / ".env").write_bytes(PRIVATE)
    said = launch("upload", str(shards))
    assert said.code == EXIT_DONE, said.err
    assert set(sent(swanlab)) == {"manifest.json", "train/00000.bin", "tokenizer/tokenizer.json"}
    assert "not sent: wiki.jsonl (no part of the data set, which is what manifest.json names)" in said.out
    assert "not sent: tokenizer/vocab.json (a link that leads out of the folder)" in said.out


def test_a_data_set_that_is_not_whole_is_not_sent(
    swanlab: SwanLab, launch: Launch, shards: Path, elsewhere: Path
) -> None:
    shard = shards / "train" / "00000.bin"
    shard.rename(elsewhere / "00000.bin")
    assert f"upload: '{shard}': belongs to the data set and is missing" in launch("upload", str(shards)).err
    shard.symlink_to(elsewhere / "00000.bin")
    assert "belongs to the data set and is a link that leads out" in launch("upload", str(shards)).err
    shard.unlink()
    shard.write_bytes(b"x")
    assert "has 1 bytes, manifest.json says" in launch("upload", str(shards)).err
    assert not swanlab.data_sets


def test_a_single_file_that_is_no_corpus_is_refused(swanlab: SwanLab, launch: Launch, corpus: Path) -> None:
    for name in ("credentials.json", ".bash_history", "notes.txt", "settings.json", "account.jsonl"):
        said = launch("upload", str(corpus / name))
        assert (said.code, said.err.count("\n")) == (EXIT_REFUSED, 1)
        assert f"upload: '{corpus / name}': is not sent: it is " in said.err
    assert not swanlab.data_sets


def test_the_store_is_asked_by_the_bucket_s_own_host_with_the_session_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What COS asks for and our S3 server does not; a proxy hears it."""
    heard: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection, connection.makefile("rb") as request:
                while (line := request.readline().strip().decode()) != "":
                    heard.append(line)
                connection.sendall(b"HTTP/1.1 200 OK\r\netag: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(cos, "ENDPOINT", cos.ENDPOINT.replace("https", "http"))
        keys = {"tmpSecretId": "id", "tmpSecretKey": "key", "sessionToken": "the-token"}
        place = {"region": "ap-beijing", "bucket": "swanlab-125", "prefix": "codes/7"}
        CodeStore(lambda: place | {"credentials": keys}).write("tasks/1.zip", b"zip")
        thread.join(timeout=30)
    assert heard[0].startswith("PUT http://swanlab-125.cos.ap-beijing.myqcloud.com/codes/7/tasks/1.zip ")
    assert "x-amz-security-token: the-token" in [line.lower() for line in heard]
