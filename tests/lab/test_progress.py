"""Progress: bars in a terminal, a few plain lines elsewhere."""

import io

from rich.console import Console

from wellposed.lab.progress import Watch


def shown(terminal, work):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Watch(console) as watch:
        work(watch)
    return console.file.getvalue()


def two_stages(watch):
    for name, total in (("tuning", 104), ("seeds", 3)):
        watch.stage(name, total)
        for _ in range(total):
            watch.advance()
        watch.end_stage()


def test_a_file_gets_a_line_for_each_tenth_and_no_control_codes():
    lines = shown(False, two_stages).splitlines()
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)
    assert sum(line.startswith("tuning") for line in lines) in (10, 11)
    assert [line.split()[1] for line in lines if line.startswith("seeds")] == ["1/3", "2/3", "3/3"]


def test_a_terminal_keeps_one_bar_for_each_stage():
    text = shown(True, two_stages)
    last = text.rsplit("tuning", 1)[1]
    assert "104/104" in last and "3/3" in last


def test_a_stage_that_ended_early_is_shown_as_ended():
    def cut(watch):
        watch.stage("tuning", 100)
        watch.advance()
        watch.end_stage()

    assert "1/1" in shown(True, cut)
