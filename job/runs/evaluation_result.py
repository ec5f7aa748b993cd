"""The result of an evaluation: nats per token, bits per byte and bits per character."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Sums over the sequences of an evaluation, in which every target token is counted once.

    The end-of-document token is a target without bytes or characters: its nats count, its text does not.
    """

    nats: float
    """Summed loss of all targets."""
    targets: int
    """Number of target tokens."""
    utf8_bytes: int
    characters: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all targets, in nats."""
        return self.nats / max(1, self.targets)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per UTF-8 byte of text, which can be compared between tokenizers."""
        return self.nats / math.log(2) / max(1, self.utf8_bytes)

    @property
    def bits_per_character(self) -> float:
        """Loss in bits per character of text."""
        return self.nats / math.log(2) / max(1, self.characters)

    def __str__(self) -> str:
        return (
            f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte, "
            f"{self.bits_per_character:.4f} bits/character ({self.targets:,} tokens)"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the metrics under the names used in the log."""
        return {
            "validation/loss": self.nats_per_token,
            "validation/bits_per_byte": self.bits_per_byte,
            "validation/bits_per_character": self.bits_per_character,
        }
