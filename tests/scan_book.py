"""Exit with an error if a built page shows a traceback, a warning, an unresolved value or a wrong interval.

Run by `make book`: python tests/scan_book.py book/_build/html
"""

import html
import re
import sys
from pathlib import Path

FAULTS = {
    "a traceback": re.compile(r"Traceback \(most recent call last\)|class=\"[^\"]*\btraceback\b"),
    "standard error": re.compile(r"class=\"[^\"]*\boutput[^\"]* stderr\b"),
    "a Python warning": re.compile(r"\b\w*Warning: "),
    "an unresolved value": re.compile(r"class=\"[^\"]*\b(pasted-text-missing|system-message)\b"),
}
NUMBER = r"([+−-]?\d+(?:\.\d+)?)"
INTERVAL = re.compile(
    rf"{NUMBER}\s?(?:%|points)?\s?\[{NUMBER}\s?%?,\s?{NUMBER}\s?%?\]"
)  # as in 0.60 [0.47, 0.70]


def faults(page: str) -> list[str]:
    """Name what is wrong with the HTML of a page."""
    found = [name for name, pattern in FAULTS.items() if pattern.search(page)]
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for match in INTERVAL.finditer(text):
        value, low, high = (float(number.replace("−", "-")) for number in match.groups())
        if not low <= value <= high:
            found.append(f"a number outside its interval, {match[0]}")
    return found


def main(folder: Path) -> int:
    """Print every fault of every page; return how many pages there are with one."""
    pages = sorted(folder.glob("*.html"))
    if not pages:
        print(f"no pages in {folder}")
        return 1
    found = {page.name: what for page in pages if (what := faults(page.read_text(encoding="utf-8")))}
    for name, what in found.items():
        print(f"{name} shows {', '.join(what)}")
    return len(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
