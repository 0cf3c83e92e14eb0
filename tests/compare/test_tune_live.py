"""The live table: reports in files, read by another process, gone when the training is over."""

import io
import json
import os
import time

from rich.console import Console

from wellposed.compare.tune_live import Report, TuneWatch, live_table, read_reports


def shown(folder, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(live_table(read_reports(folder)))
    return out.getvalue()


def test_every_training_has_a_column_with_its_step_loss_and_values(tmp_path):
    Report(tmp_path, "stn 1000").write(40, 90, 0.51234, {"dropout": 0.0712, "weight decay": 1.5e-5})
    Report(tmp_path, "untuned 1000").write(1200, 9000, 0.6, {"dropout": 0.05})
    text = shown(tmp_path)
    for words in ("stn 1000", "untuned 1000", "40/90", "1,200/9,000", "0.5123", "0.0712", "1.5e-05"):
        assert words in text
    assert len(text.splitlines()) == 5


def test_a_training_reports_at_most_a_few_times_a_second(tmp_path):
    report = Report(tmp_path, "stn 1000")
    for step in range(100):
        report.write(step, 100, 1.0, {})
    assert read_reports(tmp_path)[0]["step"] == 0
    report.end()
    assert read_reports(tmp_path) == []
    report.end()


def test_reports_of_a_killed_run_and_halves_are_left_out(tmp_path):
    Report(tmp_path, "stn 1000").write(1, 2, 1.0, {})
    path = tmp_path / "stn-1000.json"
    os.utime(path, (time.time() - 1000,) * 2)
    (tmp_path / "half.json").write_text('{"title": ')
    assert read_reports(tmp_path) == []
    assert live_table([]).row_count == 0


def test_a_report_without_a_folder_or_with_a_full_disk_costs_nothing(tmp_path):
    Report(None, "x").write(1, 2, 1.0, {})
    report = Report(tmp_path / "absent", "x")
    report.write(1, 2, 1.0, {})
    assert report.path is None


def test_a_log_file_gets_plain_lines_and_the_folder_is_cleared(tmp_path):
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "old.json").write_text("{}")
    out = io.StringIO()
    with TuneWatch(Console(file=out), folder) as watch:
        assert list(folder.iterdir()) == []
        watch.stage("training", 2)
        watch.advance()
        watch.advance()
    assert out.getvalue().splitlines()[-1].startswith("training 2/2")
    assert "\x1b" not in out.getvalue()
    assert not folder.exists()


def test_a_terminal_gets_the_bar_and_the_table(tmp_path):
    folder = tmp_path / "live"
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90)
    with TuneWatch(console, folder) as watch:
        watch.stage("training", 3)
        (folder / "stn-1000.json").write_text(
            json.dumps({"title": "stn 1000", "step": 7, "steps": 9, "loss": 0.25, "values": {"dropout": 0.3}})
        )
        time.sleep(0.6)
        watch.advance()
        watch.stage("training", 2)
    text = out.getvalue()
    for words in ("stn 1000", "7/9", "dropout", "0.3"):
        assert words in text
