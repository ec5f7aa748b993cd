"""Numbers of bytes and files as a person reads them."""


def size(number: float) -> str:
    """Return a number of bytes with a decimal unit, such as ``96 bytes``, ``3.6 kB``, ``1.6 MB`` or ``2.0 GB``."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= least:
            return f"{number / least:,.1f} {unit}"
    return f"{number:.0f} byte{'s' * (number != 1)}"


def files(number: int) -> str:
    """Return a number of files, such as ``1 file`` or ``2,000 files``."""
    return f"{number:,} file{'s' * (number != 1)}"
