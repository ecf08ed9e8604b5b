"""`python -m tests.ptx KERNEL.ptx ...`: what kernels use, and which of it the interpreter does not know (status 1).

Without a file: the opcodes that it knows, by the file that has them.
"""

import sys
from pathlib import Path

from tests.ptx.errors import UnknownInstruction
from tests.ptx.instructions import FILE_OF
from tests.ptx.survey import aligned, survey


def main(paths: list[str]) -> int:
    if not paths:
        files = dict.fromkeys(FILE_OF.values())
        print("\n".join(aligned([(file, " ".join(o for o, at in FILE_OF.items() if at == file)) for file in files])))
        return 0
    lacking = 0
    for path in paths:
        try:
            found = survey(Path(path).read_text())
        except (OSError, UnknownInstruction) as error:
            print(f"{path}: {error}", file=sys.stderr)
            lacking += 1
            continue
        print(found.text)
        lacking += len(found.lacking)
    return int(lacking > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
