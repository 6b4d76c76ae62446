"""Writes a text to learn from that every Python carries: the language reference behind the interpreter's `help()`.

    python pipelines/tiny_gpt/text.py data/python-docs.txt

About half a megabyte of English and code, the same for the same Python release; no download.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    """Write all topics, in the order of their names, to the path given as the only argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: text.py OUTPUT_PATH")
    output = Path(sys.argv[1])
    text = "\n".join(topics[name] for name in sorted(topics))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8", newline="\n")
    print(f"{output}: {len(topics)} topics, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
