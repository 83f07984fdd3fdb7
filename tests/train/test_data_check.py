"""`train --check-data` from the command line. tests/data/test_survey.py has what it notes."""

import html.parser
import json
import subprocess
import sys

import pytest
from runs import environment, log

from moss_audio_jax import command
from moss_audio_jax.train import __main__ as verb


@pytest.fixture
def rows(corpus, small_run, tmp_path):
    """rows(...) -> the options of a run with rows of `corpus` changed in these ways."""
    lines = [json.loads(line) for line in (corpus / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["conversation"][0]["content"] = str(corpus / line["conversation"][0]["content"])

    def options(name, *more):
        file = tmp_path / f"{name}.jsonl"
        each = (row if isinstance(row, str) else json.dumps(row) for row in (*lines, *more))
        file.write_text("".join(f"{row}\n" for row in each))
        return [f"--config.data.{name}=('{file}',)"]

    def with_content(number, content):
        parts = list(lines[0]["conversation"])
        parts[number] = {**parts[number], "content": content}
        return {**lines[0], "conversation": parts}

    options.lines, options.with_content = lines, with_content
    return options


def check(*options):
    return command.run(verb.main, ["--check-data", *options])


class Page(html.parser.HTMLParser):
    """The words of a page; every tag is closed, and nothing is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.said = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & dict(attrs).keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_bad_rows_are_named_and_no_device_is_used(rows, small_run, tmp_path):
    report = tmp_path / "out" / "page.html"
    bad = [
        "{",
        rows.with_content(0, "gone-1.wav"),
        rows.with_content(0, "gone-2.wav"),
        {**rows.with_content(2, "word " * 200), "id": "long"},
        rows.lines[0] | {"id": "again"},
        rows.lines[1] | {"id": "light", "weight": "1"},
    ]
    options = [*rows("train", *bad), f"--config={small_run}", f"--report={report}"]
    code = (
        "import sys, jax\n"
        "from moss_audio_jax import cli\n"
        "code = cli.main(['train', '--check-data', *sys.argv[1:]])\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--config.data.echo=2"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    numbers = next(line for line in table if line[:1] == ["data.train"])
    assert numbers[1:5] == ["12", "7", "4", "1"]
    assert any(line[:3] == ["bad", "2", "no"] for line in table)  # one reason for both files
    listed = {(row["line"], row["kind"]): row for row in log(report.parent, "page.jsonl")}
    assert set(listed) == {
        (7, "bad"),
        (8, "bad"),
        (9, "bad"),
        (10, "over-long"),
        (11, "duplicate"),
        (12, "bad"),
    }
    ids = {line: row.get("id") for (line, _), row in listed.items()}
    assert ids == {7: None, 8: None, 9: None, 10: "long", 11: "again", 12: "light"}
    assert "gone-2.wav" in listed[9, "bad"]["reason"]
    said = Page(report.read_text()).said
    assert {"Rows that cannot be used", "Filled tokens of a packed row, %"} <= set(said)


def test_good_rows_end_with_zero_and_a_leak_is_said(rows, small_run, tmp_path, capsys):
    config = f"--config={small_run}"
    report = f"--report={tmp_path / 'page.html'}"
    room = ["--config.data.length=256", "--config.data.chunks=4"]
    assert check(*rows("train"), *rows("eval"), config, report, *room) == 0
    out = capsys.readouterr().out
    assert "LEAK: 6 held-out rows are also trained on" in out
    assert [row["kind"] for row in log(tmp_path, "page.jsonl")] == ["leak"] * 6
    lines = {line.split("  ")[1]: line.split()[-1] for line in out.splitlines() if "  " in line}
    tokens = int(next(line for line in out.splitlines() if "data.train  " in line).split()[-2])
    examples = float(lines["examples in a packed row"])
    assert examples > 1
    assert float(lines["filled of its 256 tokens"][:-1]) == pytest.approx(
        100 * examples * tokens / 6 / 256, rel=0.05
    )
    steps = float(next(v for k, v in lines.items() if k.startswith("steps of an epoch")))
    assert steps == pytest.approx(6 / examples / 8, abs=0.01)


def test_questions_are_no_bad_rows(rows, small_run, tmp_path, capsys):
    for line in rows.lines:
        line["answer"], line["task"] = line["conversation"].pop()["content"], "text"
    given = [*rows("train"), f"--config={small_run}", f"--report={tmp_path / 'page.html'}"]
    assert check(*given) == 1
    source = tmp_path / "asks.py"
    source.write_text(
        small_run.read_text().replace(
            "    return c",
            "    from moss_audio_jax.post_train import run\n"
            "    c.train.source, c.policy = 'moss_audio_jax.post_train.run', run.get_config()\n"
            "    c.policy.prompts = c.policy.answers = 2\n"
            "    c.policy.prompt_tokens, c.policy.new_tokens = 96, 32\n"
            "    return c",
        )
    )
    given[-2] = f"--config={source}"
    capsys.readouterr()
    assert check(*given) == 0
    assert "neither their packing nor the steps" in capsys.readouterr().out

    wordy, plain = rows.with_content(1, "Which? " * 7), rows.lines[0]
    more = [{**plain, "answer": "x" * 40}, {**plain, "task": "odd"}, {**plain, "answer": ""}]
    rows("train", wordy, *more)
    assert check(*given) == 1  # what a run with rewards drops, or would stop for
    found = {row["line"]: (row["kind"], row["reason"]) for row in log(tmp_path, "page.jsonl")}
    assert found.keys() == {7, 8, 9, 10}
    for line, kind, reason in (
        (7, "over-long", "its prompt has 116 tokens; policy.prompt_tokens is 96"),
        (8, "over-long", "its expected answer has 41 tokens; policy.new_tokens is 32"),
        (9, "bad", "unknown task 'odd'"),
        (10, "bad", "the expected answer is empty"),
    ):
        assert found[line][0] == kind
        assert reason in found[line][1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config.data.batch=0"], "data.batch"),
        (["--config.data.length=100000"], "data.length 100000 exceeds"),
        (["--config.data.nothing=1"], "data.nothing"),
    ],
)
def test_a_config_that_cannot_run_is_bad_use(rows, small_run, tmp_path, capsys, options, said):
    report = tmp_path / "page.html"
    given = [*rows("train"), f"--config={small_run}", f"--report={report}", *options]
    assert check(*given) == 2
    assert said in capsys.readouterr().err
    assert not report.exists()


def test_options_belong_together(small_run, capsys):
    config = f"--config={small_run}"
    assert command.run(verb.main, [config]) == 2
    assert "--workdir is missing" in capsys.readouterr().err
    assert command.run(verb.main, [config, "--workdir=w", "--report=x.html"]) == 2
    assert "--report: belongs to --check-data" in capsys.readouterr().err
    assert check(config, "--report=rows.jsonl") == 2
    assert "expected *.html" in capsys.readouterr().err
