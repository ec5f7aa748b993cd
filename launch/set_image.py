"""Writes one image, by its digest, into every launch spec at once, or into none: `make set-image`.

A digest names these very bytes; so what was tested is what every pod and every node runs, whatever is pushed later.

    python -m launch.set_image [registry/name@sha256:...]      by default the image that `make push` pushed last
"""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PUSHED = "build/image-pushed"
_REFERENCE = re.compile(r"(?P<name>[a-z0-9][\w.:/-]*)@(?P<digest>sha256:[0-9a-f]{64})")
PLACES = {
    "launch/compose.yaml": (re.compile(r"^(x-job: &job\n  image: )\S+", re.MULTILINE), r"\g<1>{name}@{digest}"),
    "launch/kubernetes/base/kustomization.yaml": (
        re.compile(r"(  - name: wikillm\n    newName: )\S+(.*\n    )(?:newTag|digest): \S+"),
        r"\g<1>{name}\g<2>digest: {digest}",
    ),
    "launch/skypilot.yaml": (re.compile(r"^(  image_id: docker:)\S+", re.MULTILINE), r"\g<1>{name}@{digest}"),
    "launch/slurm.sh": (re.compile(r"^(IMAGE=\$\{IMAGE:-)[^}]*", re.MULTILINE), r"\g<1>{name}@{digest}"),
}
"""The specs that name the image: where in the file it stands, and what is put there."""


def set_image(reference: str, repository: Path = REPOSITORY) -> list[str]:
    """Writes the image into the specs; returns their names.

    Raises:
        ValueError: this is no ``name@sha256:...``, or a spec does not name its image exactly once; nothing is written.
    """
    image = _REFERENCE.fullmatch(reference)
    if image is None:
        raise ValueError(
            f"{reference!r} names no image by its digest, as registry/name@sha256:...: `make push` prints it"
        )
    written = {}
    for spec, (place, replacement) in PLACES.items():
        text, found = place.subn(
            replacement.format(**image.groupdict()), (repository / spec).read_text(encoding="utf-8")
        )
        if found != 1:
            raise ValueError(f"{spec} names its image in {found} places that look like {place.pattern!r}, not in one")
        written[spec] = text
    for spec, text in written.items():
        (repository / spec).write_text(text, encoding="utf-8")
    return list(written)


def main(words: list[str]) -> None:
    """The command; what is wrong ends it with one line and exit code 1."""
    pushed = REPOSITORY / PUSHED
    if not words and not pushed.exists():
        sys.exit(f"no image was pushed from here ({PUSHED} is not there): `make push` first, or name one")
    reference = words[0] if words else pushed.read_text(encoding="utf-8").strip()
    try:
        specs = set_image(reference)
    except ValueError as error:
        sys.exit(str(error))
    sys.stdout.writelines(f"{spec}: {reference}\n" for spec in specs)


if __name__ == "__main__":
    main(sys.argv[1:])
