"""Storage with the stores of other vendors, through stand-ins that refuse what the vendors document to refuse."""

import dataclasses
import errno
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_proxy import SLOW_DOWN, Fault, FaultProxy
from small_run import REPOSITORY
from store_stand_ins import COS, LIMITED, OBS, OSS, OSS_REFUSING, PLAIN, PUBLIC, TOS, StandIn, Store, stand_in

from job import storage
from job.config import Config
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import train_tokenizer
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.errors import UserError
from job.preflight.findings import Findings
from job.preflight.store import check_output, check_store
from job.runs.attempts import Attempts
from job.runs.run import begin_run
from job.storage import Entry, StoreError, StoreOptions, creation, local, s3

VENDORS = {
    "OSS": (OSS, "x-oss-forbid-overwrite: true"),
    "OSS that refuses If-None-Match": (OSS_REFUSING, "x-oss-forbid-overwrite: true"),
    "COS": (COS, "x-cos-forbid-overwrite: true"),
    "OBS": (OBS, "x-obs-forbid-overwrite: true"),
    "TOS": (TOS, "x-tos-forbid-overwrite: true"),
}


@pytest.fixture(autouse=True)
def fresh_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # Requests to the real server use no proxy.
    yield
    storage.configure(StoreOptions())


@pytest.fixture
def shop(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for the parameter, a `Store` or a name of `VENDORS`. Storage is configured to use it."""
    store = VENDORS[request.param][0] if isinstance(request.param, str) else request.param
    with stand_in(store, s3_server) as running:
        monkeypatch.setenv("http_proxy", running.address)
        connect(running)
        yield running


def connect(shop: StandIn, **options: Any) -> None:
    storage.configure(StoreOptions(**{"endpoint_url": shop.endpoint_url, "deadline_seconds": 30} | options))


def everything_in(server: S3Server, bucket: str) -> list[str]:
    """Return the keys of all objects that the real server has in a bucket."""
    contents = server.client().list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents", [])
    return [item["Key"] for item in contents]


# ── vendors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shop", VENDORS, indirect=True)
def test_every_operation_works_with_each_vendor(
    shop: StandIn, bucket: str, s3_server: S3Server, request: pytest.FixtureRequest
) -> None:
    method = VENDORS[request.node.callspec.params["shop"]][1]
    assert storage.creation_method(f"{bucket}/folder/object") == method
    assert everything_in(s3_server, bucket) == []
    with ThreadPoolExecutor(8) as pool:
        url = f"{bucket}/folder/created"
        created = list(pool.map(lambda number: storage.create_bytes(url, str(number).encode()), range(8)))
    assert created.count(True) == 1
    assert storage.read_bytes(url) == str(created.index(True)).encode()
    data = random.Random(0).randbytes(11 * 2**20)
    storage.write_from(f"{bucket}/large", len(data), lambda start, end: memoryview(data)[start:end])
    assert storage.open_read(f"{bucket}/large").read() == data
    for number in range(8):
        storage.write_bytes(f"{bucket}/many/{number}", b"x" * number)
    expected = [Entry(f"{bucket}/many/{number}", number) for number in range(8)]
    assert storage.list_files(f"{bucket}/many") == storage.glob(f"{bucket}/many/*") == expected
    assert storage.glob(f"{bucket}/ma*/[2-4]") == expected[2:5]
    assert not storage.exists(f"{bucket}/none")
    storage.delete_tree(f"{bucket}/many")
    assert everything_in(s3_server, bucket) == ["folder/created", "large"]
    assert {seen.is_virtual for seen in shop.requests} == {True}


def unknown(store: Store) -> Store:
    """Return the same store under a host name that does not tell the vendor, as in a private cloud."""
    return dataclasses.replace(store, host="store.corp.example")


@pytest.mark.parametrize("shop", [unknown(OSS), unknown(COS), unknown(OBS), unknown(TOS)], indirect=True)
def test_unknown_addressing_is_detected(shop: StandIn, bucket: str) -> None:
    assert storage.addressing() == "path"
    assert not storage.exists(f"{bucket}/object")
    assert storage.addressing() == "virtual"
    storage.write_bytes(f"{bucket}/object", b"content")
    connect(shop)
    with ThreadPoolExecutor(8) as pool:  # The store refuses all of them at the same time.
        assert set(pool.map(storage.read_bytes, [f"{bucket}/object"] * 8)) == {b"content"}
    connect(shop, addressing="path")
    with pytest.raises(UserError, match=r"set store\.addressing: virtual, or auto") as caught:
        storage.read_bytes(f"{bucket}/object")
    assert caught.value.setting == "store.addressing"


@pytest.mark.parametrize("shop", [PLAIN], indirect=True)
def test_addressing_can_be_set(shop: StandIn, bucket: str) -> None:
    for addressing in ("virtual", "path"):
        shop.requests.clear()
        connect(shop, addressing=addressing)
        storage.write_bytes(f"{bucket}/object", b"content")
        assert [seen.is_virtual for seen in shop.requests] == [addressing == "virtual"]


@pytest.mark.parametrize("shop", [OSS], indirect=True)
def test_endpoint_with_the_bucket_name_is_refused(shop: StandIn, bucket: str) -> None:
    connect(shop, endpoint_url=f"http://{bucket.removeprefix('s3://')}.{OSS.host}")
    with pytest.raises(UserError, match=r"store.endpoint_url: .* the address of the region, without the bucket"):
        storage.read_bytes(f"{bucket}/object")


@pytest.mark.parametrize("over_tls", [False, True])
def test_uploads_do_not_use_aws_chunked_encoding(
    bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_tls: bool
) -> None:
    """The newer checksums would use it, but only over TLS. The stand-in refuses it for every kind of write."""
    certificate = tmp_path / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=store -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", certificate, "-out", tmp_path / "public.pem"], check=True, capture_output=True
    )
    with certificate.open("a") as both:
        both.write((tmp_path / "public.pem").read_text())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "public.pem"))
    with stand_in(PLAIN, s3_server, certificate if over_tls else None) as running:
        monkeypatch.setenv("http_proxy", running.address)
        connect(running, single_writer=True)
        for size in (10, 11 * 2**20):
            storage.write_bytes(f"{bucket}/{size}", bytes(size))
            assert storage.size(f"{bucket}/{size}") == size
        assert storage.create_bytes(f"{bucket}/created", b"x")
    puts = [seen for seen in running.requests if seen.method == "PUT"]
    assert len(puts) > 5
    assert all("content-md5" in seen.headers for seen in puts)
    assert not any("x-amz-trailer" in seen.headers or "content-encoding" in seen.headers for seen in puts)


# ── no conditional writes ────────────────────────────────────────────────────────────────────────────────────────────

NO_CONDITIONAL_WRITES = {
    "ignored": PLAIN,
    "refused": dataclasses.replace(PLAIN, if_none_match="refused"),
    "answered 412, and overwritten": dataclasses.replace(PLAIN, if_none_match="lies"),
    "the wrong way round": dataclasses.replace(PLAIN, if_none_match="inverted"),
}


@pytest.mark.parametrize("shop", NO_CONDITIONAL_WRITES.values(), ids=NO_CONDITIONAL_WRITES, indirect=True)
def test_store_without_conditional_writes_is_refused(shop: StandIn, bucket: str, s3_server: S3Server) -> None:
    assert storage.creation_method(f"{bucket}/folder/object") is None
    with pytest.raises(UserError) as caught:
        storage.create_bytes(f"{bucket}/folder/object", b"content")
    told = str(caught.value)
    assert told.startswith(
        f"store.single_writer: {bucket} at http://s3.example.com does not support conditional writes"
    )
    assert "set store.single_writer: true if nobody else writes there" in told
    assert "\n" not in told
    assert everything_in(s3_server, bucket) == []
    probes = [seen.key for seen in shop.requests if seen.method == "PUT"]
    assert all(key.startswith("folder/.object.") and key.endswith(".partial") for key in probes)


@pytest.mark.parametrize("shop", [PLAIN], indirect=True)
def test_single_writer_creates_missing_files(
    shop: StandIn, bucket: str, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    connect(shop, single_writer=True)
    caplog.set_level(logging.WARNING)
    assert storage.create_bytes(f"{bucket}/folder/object", b"first")
    assert not storage.create_bytes(f"{bucket}/folder/object", b"second")
    assert storage.read_bytes(f"{bucket}/folder/object") == b"first"
    assert everything_in(s3_server, bucket) == ["folder/object"]
    assert caplog.messages == [f"{bucket}: conditional writes do not work there; relying on store.single_writer"]


@pytest.mark.parametrize("shop", [OSS], indirect=True)
def test_single_writer_still_uses_conditional_writes(shop: StandIn, bucket: str) -> None:
    connect(shop, single_writer=True)
    assert storage.create_bytes(f"{bucket}/object", b"first")
    assert shop.requests[-2].headers["x-oss-forbid-overwrite"] == "true"


def test_outage_is_not_mistaken_for_missing_conditional_writes(bucket: str, s3_server: S3Server) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage.configure(StoreOptions(proxy.endpoint_url, read_timeout_seconds=1, deadline_seconds=1))
        for refusal in (SLOW_DOWN, Fault.STALL):
            proxy.chances = {refusal: 1}
            with pytest.raises(StoreError, match="gave up after"):
                storage.create_bytes(f"{bucket}/object", b"content")
        proxy.chances = {}
        paths: list[str] = []
        proxy.inject(SLOW_DOWN, lambda request: paths.append(request.path) or request.path == paths[0], times=math.inf)
        with pytest.raises(StoreError, match="gave up after"):  # The other methods would be answered.
            storage.create_bytes(f"{bucket}/object", b"content")
        assert len({path.partition("?")[0] for path in paths}) == 1
        storage.configure(StoreOptions(proxy.endpoint_url, read_timeout_seconds=1, deadline_seconds=30))
        for fault in (SLOW_DOWN, Fault.RESET_ANSWER):
            for method in ("PUT", "HEAD", "GET", "DELETE"):
                proxy.inject(fault, lambda request, of=method: request.method == of)
        assert storage.creation_method(f"{bucket}/object") == "If-None-Match: *"
    assert everything_in(s3_server, bucket) == []


def test_store_is_probed_once_per_configuration(bucket: str, s3_server: S3Server) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage.configure(StoreOptions(proxy.endpoint_url))
        counts = []
        for number in range(3):
            proxy.requests.clear()
            assert storage.create_bytes(f"{bucket}/{number}/object", b"content")
            counts.append(len(proxy.requests))
        storage.configure(StoreOptions(proxy.endpoint_url))
        proxy.requests.clear()
        assert not storage.create_bytes(f"{bucket}/0/object", b"content")
        assert counts[1:] == [2, 2]
        assert len(proxy.requests) == counts[0] > 2


# ── a key with few rights, and none ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shop", [LIMITED], indirect=True)
def test_key_limited_to_one_prefix_is_enough(shop: StandIn, bucket: str) -> None:
    folder = f"{bucket}/team/run"
    assert not storage.exists(f"{folder}/none")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{folder}/none")
    assert storage.list_files(folder) == storage.glob(f"{folder}/*") == storage.glob(f"{bucket}/team/r*/x") == []
    assert storage.glob(f"{bucket}/team") == []  # This is a folder, given without the slash.
    assert storage.create_bytes(f"{folder}/created", b"content")
    assert not storage.create_bytes(f"{folder}/created", b"content")
    storage.write_bytes(f"{folder}/large", bytes(11 * 2**20))
    assert storage.size(f"{folder}/large") == 11 * 2**20
    assert [entry.size for entry in storage.list_files(f"{bucket}/team")] == [7, 11 * 2**20]
    storage.delete_tree(folder)
    asked = {seen.key or seen.query.get("prefix") for seen in shop.requests} - {"team"}
    assert asked
    assert all(str(name).startswith("team/") for name in asked)
    shop.requests.clear()
    for refused in (
        lambda: storage.read_bytes(f"{bucket}/other/object"),
        lambda: storage.write_bytes(f"{bucket}/other/object", b""),
        lambda: storage.create_bytes(f"{bucket}/other/object", b""),
        lambda: storage.list_files(bucket),
        lambda: storage.glob(f"{bucket}/*"),
    ):
        with pytest.raises(UserError, match=r"AWS_ACCESS_KEY_ID: the store refused to .*: AccessDenied; set "):
            refused()


@pytest.mark.parametrize("shop", [dataclasses.replace(LIMITED, may_list=False)], indirect=True)
def test_error_explains_what_a_key_without_list_right_cannot_see(shop: StandIn, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/team/object", b"content")
    assert storage.read_bytes(f"{bucket}/team/object") == b"content"
    for absent in (storage.exists, storage.read_bytes):
        with pytest.raises(UserError, match=r"AccessDenied; .* answers as if a missing object were forb") as caught:
            absent(f"{bucket}/team/none")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shop", [PUBLIC], indirect=True)
def test_public_bucket_is_read_without_credentials(
    shop: StandIn, bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/corpus.jsonl"
    s3_server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key="corpus.jsonl", Body=b"content")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"AWS_ACCESS_KEY_ID: .*store.anonymous: true to read a public bucket"):
        storage.read_bytes(url)
    connect(shop, anonymous=True)
    assert storage.read_bytes(url) == storage.open_read(url).read() == b"content"
    assert storage.glob(url) == [Entry(url, 7)]
    storage.download_file(url, tmp_path / "copy")
    assert not storage.exists(f"{bucket}/none")
    for refused in (lambda: storage.write_bytes(url, b""), lambda: storage.create_bytes(f"{bucket}/new", b"")):
        with pytest.raises(UserError, match=r"store.anonymous: True: .*; unset store.anonymous and give credentials"):
            refused()
    assert not any(seen.is_signed for seen in shop.requests)


# ── folders without hard links ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def without_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make os.link fail as link(2) documents it for file systems without hard links."""

    def link(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("without_links")
def test_exclusive_rename_replaces_missing_hard_links(tmp_path: Path) -> None:
    url = f"{tmp_path}/folder/object"
    assert storage.creation_method(url) == "exclusive rename"
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: storage.create_bytes(url, str(number).encode()), range(8)))
    assert created.count(True) == 1
    assert Path(url).read_text() == str(created.index(True))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["object"]


@pytest.mark.usefixtures("without_links")
def test_folder_without_exclusive_creation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_RENAME_NOREPLACE", 1 << 12)  # The kernel answers EINVAL to this flag.
    url = f"{tmp_path}/folder/object"
    with pytest.raises(
        UserError, match=rf"store.single_writer: {tmp_path}/folder does not support conditional writes.*hard link"
    ):
        storage.create_bytes(url, b"content")
    assert list((tmp_path / "folder").iterdir()) == []
    storage.configure(StoreOptions(single_writer=True))
    assert storage.create_bytes(url, b"first")
    assert not storage.create_bytes(url, b"second")
    assert Path(url).read_bytes() == b"first"


@pytest.mark.parametrize("method", creation._LOCAL, ids=lambda method: method.name)
def test_overwriting_rename_is_not_taken_for_exclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: creation.Method
) -> None:
    """Some file systems in user space ignore the flag, or make a copy instead of a link."""
    overwriting = creation.Method(method.name, lambda url, data: local.create(os.replace, url, data))
    monkeypatch.setattr(creation, "_LOCAL", (overwriting,))
    assert storage.creation_method(f"{tmp_path}/object") is None
    assert list(tmp_path.iterdir()) == []


# ── whole data sets and runs ─────────────────────────────────────────────────────────────────────────────────────────


def settings_for(shop: StandIn, bucket: str, folder: Path, **store: object) -> Path:
    tree = {
        "run": {"output": f"{bucket}/run"},
        "store": {"endpoint_url": shop.endpoint_url, **store},
        "data": {"source": str(SAMPLE), "shards": f"{bucket}/shards", "slice_bytes": 2**15},
        "tokenizer": {"source": str(folder / "tokenizer")},
        "tracking": {"mode": "disabled"},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def small_tokenizer(folder: Path) -> Any:
    return train_tokenizer(["人工智能是计算机科学的一个分支。", "苹果是一种水果。"] * 20, 300, folder)


@pytest.mark.parametrize("shop", [OSS, PLAIN], indirect=True, ids=["OSS", "no conditional writes"])
def test_data_set_and_run_need_conditional_writes(
    shop: StandIn, bucket: str, s3_server: S3Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    recipe = Recipe(str(SAMPLE), "text", "id", "stop", slice_bytes=2**15, validation_fraction=0.1, seed=2333)

    def begin_all() -> None:
        assert prepare(recipe, tokenizer, f"{bucket}/shards") is not None
        run = begin_run(f"{bucket}/run", None, {})
        attempts = Attempts(f"{bucket}/run")
        assert [attempts.claim(run.id, "start", None, "auto").number for _ in range(2)] == [1, 2]

    if request.node.callspec.id.startswith("no"):
        for begin in (
            lambda: prepare(recipe, tokenizer, f"{bucket}/shards"),
            lambda: begin_run(f"{bucket}/run", None, {}),
            lambda: Attempts(f"{bucket}/run").claim("id", "start", None, "auto"),
        ):
            with pytest.raises(UserError, match=r"store.single_writer: .* does not support conditional writes"):
                begin()
        assert everything_in(s3_server, bucket) == []
        connect(shop, single_writer=True)
    begin_all()
    keys = everything_in(s3_server, bucket)
    assert {"shards/plan.json", "shards/manifest.json", "run/run.json"} <= set(keys)
    assert len([key for key in keys if key.startswith("run/attempts/")]) == 2
    assert not [key for key in keys if key.endswith(".partial")]


@pytest.mark.recovery
@pytest.mark.parametrize("shop", [OSS, PLAIN], indirect=True, ids=["OSS", "no conditional writes"])
def test_prepare_command_needs_conditional_writes(
    shop: StandIn, bucket: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    small_tokenizer(tmp_path / "tokenizer")

    def run(**store: object) -> subprocess.CompletedProcess[str]:
        path = settings_for(shop, bucket, tmp_path, **store)
        command = [sys.executable, "-m", "job", "prepare", "--config", str(path)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    if request.node.callspec.id.startswith("no"):
        refused = run()
        assert refused.returncode == 78
        assert "store.single_writer" in refused.stderr
        assert "Traceback" not in refused.stderr
        done = run(single_writer=True)
    else:
        done = run()
    assert done.returncode == 0, done.stderr
    assert storage.exists(f"{bucket}/shards/manifest.json")


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows(shop: StandIn, bucket: str, **store: object) -> dict[str, tuple[str, str]]:
    """Return mark and text of the rows that `check` prints about the store, by their names."""
    config = Config.model_validate(
        {
            "run": {"output": f"{bucket}/team/run"},
            "data": {"shards": f"{bucket}/team/shards"},
            "store": {"endpoint_url": shop.endpoint_url, **store},
        }
    )
    storage.configure(StoreOptions(**config.store.model_dump()))
    findings = Findings()
    check_store(findings, config.run.output, config.data.shards, config.store, is_here=True)
    check_output(findings, config.run.output, config.store.single_writer)
    return {row.name: (row.mark, f"{row.found}; {row.remedy}") for row in findings.rows}


@pytest.mark.parametrize("shop", [OSS], indirect=True)
def test_check_prints_how_the_store_is_used(shop: StandIn, bucket: str) -> None:
    found = rows(shop, bucket)
    assert found["addressing"] == ("✓", "virtual: bucket.host/key; ")
    mark, text = found["output writable"]
    assert mark == "✓"
    assert "cannot overwrite each other there (x-oss-forbid-overwrite: true)" in text


@pytest.mark.parametrize("shop", [unknown(COS)], indirect=True)
def test_check_prints_the_detected_addressing(shop: StandIn, bucket: str) -> None:
    assert rows(shop, bucket)["addressing"] == ("✓", "virtual: bucket.host/key; ")


@pytest.mark.parametrize("shop", [PLAIN], indirect=True)
def test_check_reports_missing_conditional_writes(shop: StandIn, bucket: str) -> None:
    mark, text = rows(shop, bucket)["output writable"]
    assert mark == "✗"
    assert "set store.single_writer: true if nobody else writes there" in text
    mark, text = rows(shop, bucket, single_writer=True)["output writable"]
    assert mark == "!"
    assert "store.single_writer is trusted" in text


@pytest.mark.parametrize("shop", [LIMITED], indirect=True)
def test_check_requests_only_the_allowed_prefix(shop: StandIn, bucket: str) -> None:
    assert {mark for mark, _ in rows(shop, bucket).values()} <= {"✓", "!"}
    assert all((seen.key or seen.query["prefix"]).startswith("team/") for seen in shop.requests if seen.bucket)
