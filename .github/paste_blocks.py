"""
Print the code blocks of a page as one shell script, in order, as a reader would paste them:

    python .github/paste_blocks.py README.md | bash -euxo pipefail

Left out is what installs the package or needs a clone, and other kinds of blocks (JSON, output).
"""

import re
import sys
from pathlib import Path


BLOCK = re.compile(r"^```(bash|python|diff)\n(.*?)^```$", re.M | re.S)
LEFT_OUT = ("pip install", "make ")


def to_shell(language: str, code: str) -> str:
    """A block as shell commands; of a diff, the lines that it adds."""
    if language == "bash":
        return "".join(f"{line}\n" for line in code.splitlines() if not line.startswith(LEFT_OUT))
    if language == "diff":
        code = "".join(f"{line[1:]}\n" for line in code.splitlines() if line.startswith("+"))
    return f"python - <<'END_OF_BLOCK'\n{code}END_OF_BLOCK\n"


if __name__ == "__main__":
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    print("\n".join(to_shell(*block) for block in BLOCK.findall(page)))
