"""What a function of `crew.run` is given, by name: numbers that its parts have in common, and a share for each part.

All are int64, one behind another.  A record's names give the reader, how many there are, and how far it is from share to
share; `crew.run` refuses any other count, which would be read as somebody else's memory.
"""

from collections.abc import Sequence

from gpurnn.cpu.instructions import words

HEAD = ("parties", "ready", "barrier", "shares")  # see `crew.run`
WORD = 8  # bytes


class Record:
    """numbers, share: names in their order, with blanks between.

    read, read_share   read(values): HEAD and the numbers; read_share(values + shares + part * stride): a part's share
    """

    def __init__(self, numbers: str, share: str):
        self.numbers, self.share = tuple(numbers.split()), tuple(share.split())
        self.read, self.read_share = words(len(HEAD) + len(self.numbers)), words(len(self.share))
        self.stride = WORD * len(self.share)

    def check(self, numbers: Sequence[int], shares: Sequence[Sequence[int]]) -> None:
        """Raises TypeError where there are more or fewer than the names."""
        if len(numbers) != len(self.numbers):
            raise TypeError(f"expected {len(self.numbers)} numbers, {' '.join(self.numbers)}; got {len(numbers)}")
        for share in shares:
            if len(share) != len(self.share):
                raise TypeError(f"expected {len(self.share)} numbers a share, {' '.join(self.share)}; got {len(share)}")
