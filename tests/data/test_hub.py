"""Data sets on a hub are downloaded or streamed at one commit, and refusals are reported in one line."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_files import json_array, json_lines, parquet
from corpus_reading import DOCUMENTS
from dataset_forms import DATA_SETS, NAME, RECORDS, put
from dataset_hub import COMMIT, DatasetHub, dataset_hub

from job.data.corpus import list_corpus
from job.errors import UserError

# ---- Downloads ----

LIST = """
import sys
from job.data.corpus import Document, list_corpus, read_slices
from job.errors import UserError
try:
    for file in list_corpus(sys.argv[1]):
        items = read_slices(file, 2**20, lambda index: True, "text", "id")
        print(file.url, sum(isinstance(item, Document) for item in items))
except UserError as error:
    print(error)
"""
DOWNLOADED = "fjcanyue/wikipedia-zh-cn"
COMMIT_URL = f"hf://datasets/{DOWNLOADED}@{COMMIT}"
HUB_FILES = {
    "README.md": b"# Wikipedia",
    "zh/a.json": json_array(DOCUMENTS),
    "zh/b.jsonl.gz": b"",
    "c.parquet": parquet(DOCUMENTS),
}


def list_from_hub(source: str, endpoint: str, home: Path, offline: bool = False) -> list[str]:
    """Return the lines that a new process prints about `source`.

    A new process is needed because huggingface_hub reads its settings when it is imported.
    """
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    command = [sys.executable, "-c", LIST, source]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=Path.cwd())
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_hub_data_set_is_downloaded_once_and_then_read_offline(tmp_path):
    expected = [f"{COMMIT_URL}/c.parquet 300", f"{COMMIT_URL}/zh/a.json 300", f"{COMMIT_URL}/zh/b.jsonl.gz 0"]
    with dataset_hub({DOWNLOADED: HUB_FILES}) as hub:
        assert list_from_hub(DOWNLOADED, hub.url, tmp_path) == expected
        assert list_from_hub(f"hf://datasets/{DOWNLOADED}@main/zh", hub.url, tmp_path) == expected[1:]
    assert list_from_hub(f"{DOWNLOADED}@main", hub.url, tmp_path) == expected, "the hub is gone now"
    assert list_from_hub(f"{COMMIT_URL}/zh/*.json", hub.url, tmp_path, offline=True) == expected[1:2]


@pytest.mark.parametrize(
    ("source", "gated", "complaint"),
    [
        ("fjcanyue/wikipedia", False, "no such path here, and no such data set on the hub"),
        ("fjcanyue/wikipedia-zh-cn@v9", False, "the data set has no revision 'v9'"),
        ("fjcanyue/wikipedia-zh-cn", True, "access to this data set is granted only on request"),
    ],
)
def test_hub_refusal_is_reported_in_one_line(source, gated, complaint, tmp_path):
    with dataset_hub({DOWNLOADED: HUB_FILES}, [DOWNLOADED] if gated else []) as hub:
        [line] = list_from_hub(source, hub.url, tmp_path)
    assert line.startswith(f"data.source: '{source}': {complaint}")


@pytest.mark.parametrize("how", ["closed", "silent", "offline"])
def test_unreachable_hub_is_reported_soon_with_alternatives(how, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        # The server accepts connections and never answers.
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if how == "closed":
            server.close()
        started = time.monotonic()
        [line] = list_from_hub("fjcanyue/wikipedia-zh-cn", endpoint, tmp_path, how == "offline")
        assert time.monotonic() - started < 15
    assert line.startswith(
        f"data.source: 'fjcanyue/wikipedia-zh-cn': no such path here, and the hub {endpoint} cannot be reached"
    )
    assert (
        "set HF_ENDPOINT (for example https://hf-mirror.com), or use modelscope://owner/name, or a URL; "
        "if you mean a folder here, write ./fjcanyue/wikipedia-zh-cn"
    ) in line
    assert ("HF_HUB_OFFLINE is set" in line) == (how == "offline")


def test_missing_modelscope_package_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        list_corpus("modelscope://AI-ModelScope/wikipedia")


# ---- Streams ----

READ = """
import json, sys
from job.local_dirs import use_scratch
from job.data.corpus import BadRecord, Document, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.fingerprint import identify
from job.errors import UserError
use_scratch(print)
for case in json.loads(sys.argv[1]):
    try:
        files = list_corpus(case[0], choice=Choice(*case[1:]))
        items = [item for file in files for item in read_slices(file, 2**20, lambda index: True, "text", "id")]
        [print(item.reason) for item in items if isinstance(item, BadRecord)]
        fingerprints = identify(files).fingerprints
        documents = sum(isinstance(item, Document) for item in items)
        identified = zip(files, fingerprints)
        print(documents, *(f"{file.url} {one.revision} {one.hub_hash is not None}" for file, one in identified))
    except UserError as error:
        print(error)
    print("datasets" in sys.modules)
"""
Case = list[str | None]


def read_from_hub(hub: DatasetHub, home: Path, *cases: Case) -> list[tuple[str, bool]]:
    """Return the line that a new process prints about each case, and whether it has imported the library by then.

    Check that the process prints nothing else, writes nothing outside its scratch folder, and leaves no lock folder.
    """
    settings = {
        "HF_ENDPOINT": hub.url,
        "HTTPS_PROXY": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HOME": str(home / "home"),
        "WIKILLM_SCRATCH": str(home / "scratch"),
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    (home / "home").mkdir(exist_ok=True)
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "WIKILLM"))}
    command = [sys.executable, "-c", READ, json.dumps(cases)]
    result = subprocess.run(command, env=cleared | settings, capture_output=True, text=True, cwd=Path.cwd())
    warned = [line for line in result.stderr.splitlines() if not re.search("thrown while requesting|Retrying in", line)]
    assert (result.returncode, warned) == (0, [])
    assert not list((home / "home").rglob("*"))
    assert not list((home / "scratch").glob("*/datasets-*"))
    lines = result.stdout.splitlines()
    return list(zip(lines[0::2], [line == "True" for line in lines[1::2]], strict=True))


def test_hub_is_streamed_at_a_commit_and_errors_are_one_line(tmp_path: Path) -> None:
    """Covers configurations, splits, plain data sets, interrupted answers, and names that do not exist."""
    put(tmp_path, **{"plain.jsonl": json_lines(RECORDS)})
    good: list[Case] = [[f"{NAME}@main", "lines"], [NAME, "zh", "train"]]
    texts: list[Case] = [["owner/texts"], ["owner/texts", None, "train", "paragraph"]]
    wrong: list[Case] = [
        *([NAME, "zh"], [NAME, "en"], [f"{NAME}@v9", "zh"], [f"{NAME}/zh", "zh"], ["owner/gated", "zh"]),
        *(["owner/none", "zh"], ["modelscope://owner/wiki", "zh"]),
    ]
    with dataset_hub(DATA_SETS) as hub:
        hub.cut_off = 2
        (plain, is_imported), *others = read_from_hub(hub, tmp_path, [f"{tmp_path}/plain.jsonl"], *good, *texts, *wrong)
    assert plain.startswith("200 ") and not is_imported, "JSON is read without the library"
    lines = [line for line, _ in others]
    prefix, end = f"hf://datasets/{NAME}@{COMMIT}", f"{COMMIT} True"
    assert lines[0] == f"200 {prefix}/lines.jsonl {end}"
    assert lines[1] == f"200 {prefix}/zh/train-0.csv {end} {prefix}/zh/train-1.csv {end}"
    assert hub.cut_off == 0, "answers were interrupted"
    texts_url = f"hf://datasets/owner/texts@{COMMIT}"
    assert lines[2] == f"4 {texts_url}/a.txt {end} {texts_url}/b.txt.gz {end}"
    assert lines[3].startswith("3 ")
    complaints = [
        *("'train', 'test'", "['zh', 'lines']", "no revision 'v9'", "neither configurations nor splits"),
        *("granted only on request", "no such data set on the hub", "set data.source to files, such as modelscope://"),
    ]
    assert all(complaint in line for line, complaint in zip(lines[4:], complaints, strict=True))
    assert all("/datasets/owner/" in request for request in hub.requests), "there are no requests beyond the data sets"
    revisions = re.findall(r"/(?:revision|resolve|tree|paths-info)/([^/?\s]+)", "\n".join(hub.requests))
    assert set(revisions) == {"main", "v9", COMMIT}
    assert not any("/resolve/main/" in request for request in hub.requests), "a branch may change meanwhile"
