"""List the commands: `python -m dist_proxygml`."""

import ast
import re
from pathlib import Path

from dist_proxygml.cli import run_command


def main() -> int:
    """Print every command with the first words of its file."""
    print("python -m dist_proxygml.COMMAND --help shows the options of a COMMAND:\n")
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in source:
            opening = ast.get_docstring(ast.parse(source)) or ""
            print(f"  {path.stem:<10}{re.split(r'[:.]', opening, maxsplit=1)[0]}")
    print("\nThe first are shard build, init and train; docs/tutorial.md goes through all that a search page needs.")
    return 0


if __name__ == "__main__":
    run_command(main)
