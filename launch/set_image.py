"""Write one image reference, with its digest, into all launch specs at once (`make set-image`).

A digest always names the same bytes, so every node runs the image that was tested, even if a tag is pushed again.

    python -m launch.set_image [registry/name@sha256:...]      default: the image that `make push` pushed last
"""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PUSHED = "build/image-pushed"
_REFERENCE = re.compile(r"(?P<name>[a-z0-9][\w.:/-]*)@(?P<digest>sha256:[0-9a-f]{64})")
IMAGE_PATTERNS = {
    "launch/compose.yaml": (re.compile(r"^(x-job: &job\n  image: )\S+", re.MULTILINE), r"\g<1>{name}@{digest}"),
    "launch/kubernetes/base/kustomization.yaml": (
        re.compile(r"(  - name: wikillm\n    newName: )\S+(.*\n    )(?:newTag|digest): \S+"),
        r"\g<1>{name}\g<2>digest: {digest}",
    ),
    "launch/skypilot.yaml": (re.compile(r"^(  image_id: docker:)\S+", re.MULTILINE), r"\g<1>{name}@{digest}"),
    "launch/slurm.sh": (re.compile(r"^(IMAGE=\$\{IMAGE:-)[^}]*", re.MULTILINE), r"\g<1>{name}@{digest}"),
}
"""Pattern of the image in each spec, and its replacement."""


def set_image(reference: str, repository: Path = REPOSITORY) -> list[str]:
    """Write the image into the specs and return their names.

    Raises:
        ValueError: `reference` is not of the form ``name@sha256:...``, or a spec does not contain its image exactly
            once. Then no spec is changed.
    """
    image = _REFERENCE.fullmatch(reference)
    if image is None:
        raise ValueError(f"{reference!r} has no digest: expected registry/name@sha256:..., as `make push` prints it")
    changed = {}
    for spec, (pattern, replacement) in IMAGE_PATTERNS.items():
        text, count = pattern.subn(
            replacement.format(**image.groupdict()), (repository / spec).read_text(encoding="utf-8")
        )
        if count != 1:
            raise ValueError(f"{spec}: expected one match of {pattern.pattern!r}, found {count}; correct the spec")
        changed[spec] = text
    for spec, text in changed.items():
        (repository / spec).write_text(text, encoding="utf-8")
    return list(changed)


def main(words: list[str]) -> None:
    """Run the command; an error ends it with one line and exit code 1."""
    pushed = REPOSITORY / PUSHED
    if not words and not pushed.exists():
        sys.exit(f"no image was pushed from here ({PUSHED} is missing): run `make push` first, or name an image")
    reference = words[0] if words else pushed.read_text(encoding="utf-8").strip()
    try:
        specs = set_image(reference)
    except ValueError as error:
        sys.exit(str(error))
    sys.stdout.writelines(f"{spec}: {reference}\n" for spec in specs)


if __name__ == "__main__":
    main(sys.argv[1:])
