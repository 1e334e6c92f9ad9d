"""Execute the pages of the book, several at a time, and keep what they say where the build looks for it.

Run by `make book`: python tests/execute_book.py book. The build executes again what fails here, and says why.
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution

AT_A_TIME = min(4, os.cpu_count() or 1)
"""More of them would need more memory than a laptop has: half a gigabyte to two for a page."""

SECONDS = 300


def execute(page: Path) -> str:
    """Execute a page in its folder; return its name and how long it took."""
    notebook = nbformat.read(page, as_version=4)
    result = single_nb_execution(notebook, cwd=str(page.parent), timeout=SECONDS, allow_errors=False)
    if result.err is not None:
        return f"{page.name} failed"
    bundle = CacheBundleIn(notebook, str(page), data={"execution_seconds": result.time})
    cache = get_cache(page.parent / "_build" / ".jupyter_cache")
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return f"{page.name} {result.time:.0f} s"


def _length(page: Path) -> tuple[bool, int]:
    """Tell what goes with the time that a page takes: whether it trains a network, and how much is in it."""
    text = page.read_text(encoding="utf-8")
    return "ms.fit(" in text, len(text)


def main(book: Path) -> None:
    """Execute all, the long ones first, so that none of them comes last and alone."""
    pages = sorted(book.resolve().glob("*.ipynb"), key=_length, reverse=True)
    get_cache(book.resolve() / "_build" / ".jupyter_cache").clear_cache()
    with get_context("spawn").Pool(AT_A_TIME) as pool:
        for number, said in enumerate(pool.imap_unordered(execute, pages), 1):
            print(f"{number} of {len(pages)} pages: {said}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
