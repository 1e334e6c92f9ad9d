import pytest
from scan_book import faults, main


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<p>all well</p>", []),
        ("<pre>Traceback (most recent call last)</pre>", ["a traceback"]),
        ('<div class="output stderr highlight"><pre>oops</pre></div>', ["standard error"]),
        ("<pre>FutureWarning: soon gone</pre>", ["a Python warning"]),
        ('<aside class="system-message">', ["an unresolved value"]),
    ],
)
def test_faults_of_a_page_are_named(page, expected):
    assert faults(page) == expected


def test_a_book_with_a_faulty_page_fails_and_an_empty_folder_too(tmp_path):
    assert main(tmp_path) == 1
    (tmp_path / "good.html").write_text("<p>fine</p>")
    assert main(tmp_path) == 0
    (tmp_path / "bad.html").write_text("Traceback (most recent call last)")
    assert main(tmp_path) == 1
