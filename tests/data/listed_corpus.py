"""Write corpus files into a folder or a store, and list what a source holds."""

from pathlib import Path

from corpus_files import Fields, json_lines

from job import storage
from job.data.corpus import Document, Listing, list_corpus, read_slices

DOCUMENTS: list[Fields] = [{"id": str(number), "text": f"第{number}段"} for number in range(10)]
LINES = json_lines(DOCUMENTS)


def listed(source: object) -> Listing:
    """Return the listing of a source."""
    listings: list[Listing] = []
    list_corpus(str(source), listings.append)
    return listings[0]


def names(source: object) -> list[str]:
    return list(listed(source).names)


def left_out(source: object) -> dict[str, str]:
    """Return the reason for each name that is left out."""
    return {item.name: item.reason for item in listed(source).left_out}


def documents_in(source: object) -> int:
    """Return the number of documents."""
    files = list_corpus(str(source))
    items = (item for file in files for item in read_slices(file, 2**20, lambda index: True, "text", "id"))
    return sum(isinstance(item, Document) for item in items)


def write(folder: str | Path, *paths: str, content: bytes = LINES) -> None:
    """Write files with this content below a folder or URL."""
    for path in paths:
        if storage.is_remote(str(folder)):
            storage.write_bytes(storage.join(str(folder), path), content)
        else:
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_bytes(content)
