import pytest
from scan_book import main


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("<p>all well</p>", ""),
        ("<pre>Traceback (most recent call last)</pre>", "a traceback"),
        ('<div class="output stderr highlight"><pre>oops</pre></div>', "standard error"),
        ("<pre>FutureWarning: soon gone</pre>", "a Python warning"),
        ('<aside class="system-message">', "an unresolved value"),
        ("<p>75 % [58, <b>200 %</b>], −0.11 [−0.12, 0.08]</p>", ""),
        ("<p>higher by <span>75%</span>\n[58%, 70%]</p>", "a number outside its interval, 75%\n[58%, 70%]"),
    ],
)
def test_book_with_a_faulty_page_fails_naming_the_fault_and_an_empty_folder_too(
    page, fault, tmp_path, capsys
):
    assert main(tmp_path) == 1
    assert capsys.readouterr().out == f"no pages in {tmp_path}\n"
    (tmp_path / "good.html").write_text("<p>fine</p>")
    (tmp_path / "page.html").write_text(page)
    assert main(tmp_path) == bool(fault)
    assert capsys.readouterr().out == (f"page.html shows {fault}\n" if fault else "")
