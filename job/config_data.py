"""The settings of output, object store and data: the sections `run`, `store`, `data` and `tokenizer`."""

from typing import Literal

from pydantic import ByteSize

from job.setting_kinds import YEAR_SECONDS, Section, setting

MiB = 2**20
GiB = 2**30


class Run(Section):
    """Name of the run, and the folder or URL of its files."""

    output: str = setting(
        "data/run",
        "Folder or URL (such as s3://bucket/runs/one) for the checkpoints, the final model and the logs of the run",
        min_length=1,
    )
    name: str | None = setting(None, "Name of the run in the tracker; null: the last part of run.output")


class Store(Section):
    """Connection to object stores. Credentials come only from environment variables (AWS_ACCESS_KEY_ID, ...)."""

    endpoint_url: str | None = setting(
        None, "Address of the S3 service; null: AWS_ENDPOINT_URL, or Amazon S3 if that is not set", pattern="^https?://"
    )
    region: str | None = setting(None, "Region of the S3 service; null: AWS_DEFAULT_REGION")
    connect_timeout_seconds: float = setting(
        5.0, "Longest wait for a connection", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    read_timeout_seconds: float = setting(
        30.0, "Longest pause of the server within one answer", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    deadline_seconds: float = setting(
        300.0, "Longest time for one operation, with all its retries", unit="seconds", gt=0, le=YEAR_SECONDS
    )
    addressing: Literal["auto", "virtual", "path"] = setting(
        "auto",
        "How requests name a bucket. virtual: bucket.host/key; path: host/bucket/key; auto: virtual for Alibaba OSS, "
        "Tencent COS, Huawei OBS, Volcengine TOS and every service that refuses path, the choice of AWS for Amazon S3, "
        "path for all others",
    )
    single_writer: bool = setting(
        False,
        "Promise that no other process writes to data.shards and run.output at the same time. Needed only for a store "
        "without conditional writes, which cannot keep two `prepare` commands or two runs from mixing their files",
    )
    anonymous: bool = setting(False, "Send requests without credentials, which is enough to read public buckets")


class Data(Section):
    """The corpus, the token shards made from it, and how training reads them."""

    source: str = setting(
        "fjcanyue/wikipedia-zh-cn",
        "The corpus. A data set on Hugging Face (owner/name), modelscope://owner/name, or the path, folder, URL or "
        "glob of files: JSON, JSON lines or Parquet (plain, .gz or .zst), .txt, .csv, .tsv, .arrow, WebDataset .tar, "
        "or a folder made by save_to_disk. Files whose names begin with . or _, and files that this program has "
        "written there, are ignored",
        min_length=1,
    )
    subset: str | None = setting(
        None,
        "Subset (configuration) to read, such as 20231101.zh, of a data set on Hugging Face or of a local folder whose "
        "README.md lists subsets; null: the default subset, or all JSON and Parquet files if source_split is null too",
        min_length=1,
    )
    source_split: str | None = setting(
        None,
        "Split to read, such as train, of a data set on Hugging Face or of a saved DatasetDict. Its documents are "
        "divided into training and validation by validation_fraction, like any corpus; null: the only split",
        min_length=1,
    )
    text_documents: Literal["paragraph", "line", "file"] | None = setting(
        None,
        "What one document is in .txt files: a paragraph (ended by an empty line), a line, or the whole file; null: "
        "paragraph; for a data set on a hub or with a subset, what its README.md says, or line if it says nothing",
    )
    text_field: str = setting("text", "Field of a record that holds the text", min_length=1)
    id_field: str = setting(
        "id",
        "Field of a record that identifies the document; any scalar but a boolean. The hash of this value decides "
        "between training and validation; the hash of the text does if the field is absent or null",
        min_length=1,
    )
    on_bad_record: Literal["stop", "skip"] = setting(
        "stop", "What to do about a broken record. stop: exit with its position; skip: count it and leave it out"
    )
    shards: str = setting("data/shards", "Folder or URL of the token shards", min_length=1)
    slice_bytes: ByteSize = setting(
        ByteSize(64 * MiB),
        "Size of the slices into which `prepare` cuts the corpus; each slice becomes one shard. Smaller files share a "
        "slice",
        unit="bytes",
        ge=1024,
    )
    validation_fraction: float = setting(
        0.1, "Share of the documents, from 0 to 1, used for validation instead of training", ge=0, lt=1
    )
    seed: int = setting(2333, "Random seed of the validation split and of the order of training", ge=0, lt=2**63)
    processes: int = setting(1, "Processes that prepare shards on this machine", unit="processes", ge=1, le=256)
    worker: str | None = setting(
        None,
        "Part of the corpus that this `prepare` worker does, as i/n with 0 <= i < n; null: what the array job says, or "
        "the whole corpus outside of an array job",
        pattern=r"^\d+/[1-9]\d*$",
    )
    cache_dir: str | None = setting(
        None,
        "Local folder for the shards in use; null: shards in WIKILLM_SCRATCH if that is set, else ~/.cache/wikillm",
    )
    cache_bytes: ByteSize = setting(
        ByteSize(32 * GiB), "Largest disk space that the shards in cache_dir may take", unit="bytes", ge=1 * MiB
    )
    shuffle_bytes: ByteSize = setting(
        ByteSize(16 * GiB),
        "Size of the shards whose sequences are shuffled together; they are on the disk at the same time",
        unit="bytes",
        ge=1 * MiB,
    )
    node_groups: int = setting(
        1,
        "Number of groups into which the nodes are divided; each group reads its own part of the shards. Useful above "
        "about 16 nodes",
        unit="groups",
        ge=1,
        le=2**20,
    )
    prefetch_steps: int = setting(
        4, "Batches that are prepared ahead of the training step", unit="steps", ge=1, le=2**16
    )
    loader_workers: int = setting(
        1, "Threads of each training process that cut batches from shards", unit="threads", ge=1, le=64
    )


class Tokenizer(Section):
    """The tokenizer that `prepare` uses, and how `job tokenizer` trains one."""

    source: str = setting(
        "data/tokenizer",
        "The tokenizer. A model on Hugging Face (owner/name), modelscope://owner/name, or a folder or URL with a "
        "tokenizer.json. `job tokenizer` writes to this folder or URL, and `prepare` trains a tokenizer there first if "
        "the folder is empty or does not exist",
        min_length=1,
    )
    vocab_size: int = setting(
        16384, "Vocabulary size of a tokenizer trained by `job tokenizer`", unit="tokens", ge=257, le=2**24
    )
    train_bytes: ByteSize = setting(
        ByteSize(200 * MiB),
        "Largest amount of text that `job tokenizer` trains on: the training documents with the smallest hashes, from "
        "everywhere in the corpus. Training takes about 60 bytes of memory per byte",
        unit="bytes",
        ge=1,
    )
    engine: Literal["auto", "reference"] = setting(
        "auto",
        "What `prepare` tokenizes with. auto: a faster tokenizer for as long as it agrees with the reference; "
        "reference: the tokenizer of Hugging Face alone. Both give the same tokens",
    )
