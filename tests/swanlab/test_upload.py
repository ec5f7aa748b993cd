"""A data set's way into SwanLab's store: whole or said to have failed, gone on with, and by the address COS has."""

import socket
import threading
from pathlib import Path

import pytest
from launched import Launch
from service import SwanLab

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED
from launch.swanlab import cos
from launch.swanlab.cos import CodeStore


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    (folder / "train").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "train" / "00000.bin").write_bytes(b"\x01" * 1000)
    return folder


def test_a_folder_arrives_under_the_name_of_the_data_set(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    said = launch("upload", str(shards), "--name", "WIKI_CN")
    assert said.code == EXIT_DONE, said.err
    ((cuid, data_set),) = swanlab.data_sets.items()
    assert data_set == {"name": "WIKI_CN", "status": "SUCCESS"}
    assert swanlab.objects("datasets") == {
        f"datasets/{cuid}/WIKI_CN/manifest.json": b"{}",
        f"datasets/{cuid}/WIKI_CN/train/00000.bin": b"\x01" * 1000,
    }
    assert f"id: {cuid}" in said.out and "--data.shards /data/WIKI_CN" in said.out


def test_a_large_file_arrives_in_parts(
    swanlab: SwanLab, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "PART_BYTES", 5 * 2**20)
    content = bytes(range(256)) * 4 * 12 * 1024
    (tmp_path / "wiki.json").write_bytes(content)
    assert launch("upload", str(tmp_path / "wiki.json")).code == EXIT_DONE
    (cuid,) = swanlab.data_sets
    assert swanlab.objects("datasets") == {f"datasets/{cuid}/wiki.json/wiki.json": content}


def test_what_fails_is_told_to_the_service_and_gone_on_with(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, sent = CodeStore.upload, []

    def fails_at_the_second(self: CodeStore, file: Path, path: str) -> None:
        sent.append(file.name)
        if len(sent) == 2:
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
    assert sent == ["manifest.json", "00000.bin", "00000.bin"]
    assert swanlab.data_sets == {cuid: {"name": "WIKI_CN", "status": "SUCCESS"}}
    assert len(swanlab.objects("datasets")) == 2


def test_a_file_of_another_size_is_sent_again(swanlab: SwanLab, launch: Launch, shards: Path) -> None:
    launch("upload", str(shards), "--name", "WIKI_CN")
    (cuid,) = swanlab.data_sets
    (shards / "manifest.json").write_text('{"more": 1}')
    said = launch("upload", str(shards), "--name", "WIKI_CN", "--resume", cuid)
    assert "00000.bin: is there" in said.out
    assert swanlab.objects("datasets")[f"datasets/{cuid}/WIKI_CN/manifest.json"] == b'{"more": 1}'


def test_keys_that_have_ended_are_replaced(
    swanlab: SwanLab, launch: Launch, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cos, "_FRESH_SECONDS", -1)
    assert launch("upload", str(shards)).code == EXIT_DONE
    assert swanlab.store_keys_given == 3


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
    (shards / ".env").touch()
    assert "has the name of a file that holds secrets" in launch("upload", str(shards)).err
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
