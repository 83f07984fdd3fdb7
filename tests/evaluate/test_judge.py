"""The judge, with an endpoint that the test runs."""

from __future__ import annotations

import dataclasses
import http.server
import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from moss_audio_jax import command
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import __main__ as verb
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.judge import Judge, judge, question, read_scores, summary

ITEMS = [
    Item("c1", "caption", "Describe.", (), {"gender": "female", "tone": "warm {x}"}, {}),
    Item("c2", "caption", "Describe.", (), {"gender": "male"}, {}),
    Item("o1", "open", "Why does it ring?", (), {"answer": "someone calls"}, {}),
    Item("a1", "asr", "Transcribe.", (), {"text": "x"}, {}),
    Item("w1", "caption", "Describe.", (), {"sources": [["dog"]]}, {}),
]
ANSWERS = {"c1": "A woman.", "c2": "A man.", "o1": "a call"}


@pytest.fixture
def endpoint(request):
    """An endpoint that answers each request with the next of `replies`: text or (status, body)."""

    class Endpoint(http.server.BaseHTTPRequestHandler):
        replies: dict[str, list] = {}  # noqa: RUF012  what stands in the prompt -> replies
        asked: list[tuple] = []  # noqa: RUF012  (path, key, body)
        lock = threading.Lock()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.lock:
                self.asked.append((self.path, self.headers["Authorization"], body))
                prompt = body["messages"][0]["content"]
                replies = next(v for k, v in self.replies.items() if k in prompt)
                reply = replies.pop(0) if len(replies) > 1 else replies[0]
            chat = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
            status, said = reply if isinstance(reply, tuple) else (200, chat)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_):
            pass

    Endpoint.replies, Endpoint.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Endpoint
    server.shutdown()
    server.server_close()
    thread.join()


def test_judgements_are_whole_and_kept(endpoint, tmp_path):
    output = tmp_path / "judgements.jsonl"
    by = Judge(endpoint.url, "some-model", key="secret", wait=0)
    endpoint.replies = {
        "A woman.": [(503, "busy"), '```json\n{"gender": 5, "tone": 2}\n```'],
        "A man.": ['{"gender": 9}', '{"gender": 3}'],
        "a call": ['<think>{1}</think>\n\nIt is {"answer": 4}'],
    }
    found = judge(by, ITEMS, ANSWERS, output, workers=1)
    assert [(row["id"], row["scores"]) for row in found] == [
        ("c1", {"gender": 5, "tone": 2}),
        ("c2", None),
        ("o1", {"answer": 4}),
    ]
    assert found[1]["error"] == "gender has 9; expected an integer from 1 to 5"
    assert found[1]["raw_judgement"] == '{"gender": 9}'
    assert {row["judge"]["model"] for row in found} == {"some-model"}
    assert summary(found) == {
        "n": 3,
        "failed": 1,
        "mean": pytest.approx(11 / 3),
        "fields": {"gender": 5.0, "tone": 2.0, "answer": 4.0},
    }
    path, key, body = endpoint.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert "secret" not in output.read_text() + repr(by)
    assert [json.loads(line) for line in output.read_text().splitlines()] == found

    # Again, after a kill in the middle of a line: only failed and lost questions are asked.
    whole = output.read_text()
    output.write_text(whole[: whole.rindex("scores")])
    endpoint.asked.clear()
    again = judge(by, ITEMS, ANSWERS, output, workers=1)
    assert [row["scores"] for row in again][1:] == [{"gender": 3}, {"answer": 4}]
    assert len(endpoint.asked) == 2
    assert [json.loads(line) for line in output.read_text().splitlines()] == again
    # Another answer, or another judge, is another question.
    endpoint.replies["Another."] = ['{"answer": 1}']
    judge(by, ITEMS, {**ANSWERS, "o1": "Another."}, output, workers=1)
    assert len(endpoint.asked) == 3
    other = Judge(endpoint.url, "other-model", wait=0)
    assert len(judge(other, ITEMS[1:2], ANSWERS, tmp_path / "judgements.jsonl")) == 1
    assert len(endpoint.asked) == 4


def test_no_answer_is_the_lowest_without_asking(endpoint, tmp_path):
    found = judge(Judge(endpoint.url, "m"), ITEMS[:1], {"c1": " "}, tmp_path / "j.jsonl")
    assert found[0]["scores"] == {"gender": 1, "tone": 1}
    assert endpoint.asked == []


def test_ctrl_c_does_not_wait_for_what_is_asked(tmp_path):
    """Eight questions to a server that never answers; nothing is written."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        items = [dataclasses.replace(ITEMS[0], id=str(i)) for i in range(99)]

        def interrupt():
            for _ in range(8):  # not while the pool's threads are being started
                silent.accept()
            while True:  # Python drops an interrupt that falls into a callback of the collector
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                if raised.wait(10):
                    return

        raised = threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            judge(Judge(url, "m", timeout=600), items, {i.id: "x" for i in items}, tmp_path / "j")
        raised.set()
        thread.join()
        began = time.monotonic()
        for left in [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]:
            left.join(60)
        assert time.monotonic() - began < 60
    assert not (tmp_path / "j").exists()


def test_what_a_damaged_file_holds_is_asked_again(endpoint, tmp_path):
    output, by = tmp_path / "j.jsonl", Judge(endpoint.url, "m", wait=0)
    endpoint.replies = {"A man.": ['{"gender": 3}']}
    whole = judge(by, ITEMS[1:2], {"c2": "A man.\ud800"}, output)[0]
    endpoint.asked.clear()
    damage = (
        {"scores": "x"},
        {"scores": {"gender": 9}},
        {"scores": {}},
        {"prompt_hash": []},
        {"judge": None},
        {"scores": None},
    )
    for change in damage:
        output.write_text(json.dumps(whole | change) + "\n")
        assert judge(by, ITEMS[1:2], {"c2": "A man.\ud800"}, output)[0]["scores"] == {"gender": 3}
    assert len(endpoint.asked) == len(damage)
    assert judge(by, ITEMS[1:2], {"c2": "A man.\ud800"}, output) == [whole]
    assert len(endpoint.asked) == len(damage)


def test_what_the_judge_is_asked():
    prompt, fields = question(ITEMS[0], "A woman, {loud}.")
    assert fields == ("gender", "tone")
    for part in ('"tone": "warm {x}"', "A woman, {loud}.", 'keys "gender", "tone"'):
        assert part in prompt
    prompt, fields = question(ITEMS[2], "a call")
    assert "Why does it ring?" in prompt
    assert "someone calls" in prompt
    with pytest.raises(UsageError, match="a1: a judge is for captions"):
        question(ITEMS[3], "x")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("Five!", "no JSON object in 'Five!'"),
        ('{"a": 5', "no JSON object"),
        ('{"a": {1}}', "no JSON object"),
        ('{"b": 5}', "a has None"),
        ('{"a": true}', "a has True"),
        ('{"a": "5"}', "a has '5'"),
        ('{"a": 4.5}', "a has 4.5"),
        ('{"a": 0}', "a has 0"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "a has "),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "no JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "no JSON object"),
        ("{" * 200_000, "no JSON object"),
    ],
)
def test_judgements_that_cannot_be_read(raw, words):
    with pytest.raises(InputError, match=words):
        read_scores(raw, ("a",))


@pytest.mark.parametrize(
    ("reply", "asked", "words"),
    [
        ((401, "no key"), 1, "HTTP 401 no key"),
        ((429, "slowly"), 3, "HTTP 429 slowly"),
        ((200, "<html>"), 1, "not a chat completion"),
        ((200, '{"choices": []}'), 1, "not a chat completion"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), 1, "not a chat completion"),
    ],
)
def test_endpoints_that_fail(endpoint, reply, asked, words):
    endpoint.replies = {"hello": [reply]}
    with pytest.raises(InputError, match=f"judge m at {endpoint.url}: .*{words}"):
        Judge(endpoint.url, "m", attempts=3, wait=0).ask("hello")
    assert len(endpoint.asked) == asked


def test_command_line(endpoint, tmp_path, capsys):
    data, predictions = tmp_path / "captions.jsonl", tmp_path / "p.jsonl"
    data.write_text('{"id": "c", "audio": "c.wav", "gender": "male"}\n')
    predictions.write_text('{"id": "c", "answer": "A man.", "raw_output": "A man."}\n')
    endpoint.replies = {"A man.": ['{"gender": 4}', (401, "no")]}

    def run(output: str, benchmark: str = "caption", data: Path = data) -> int:
        capsys.readouterr()
        argv = [
            "judge",
            "--benchmark",
            benchmark,
            "--data",
            data,
            "--predictions",
            predictions,
            "--output",
            tmp_path / output,
            "--url",
            endpoint.url,
            "--model",
            "m",
        ]
        return command.run(verb.main, [str(word) for word in argv])

    assert run("j.jsonl") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["mean"], told["n"], told["failed"]) == (4.0, 1, 0)
    assert told["judge"]["url"] == endpoint.url
    assert run("other.jsonl") == 1
    assert f"error: c: judge m at {endpoint.url}: HTTP 401 no" in capsys.readouterr().err
    data.write_text(data.read_text() + '{"id": "d", "audio": "d.wav", "gender": "male"}\n')
    assert run("j.jsonl") == 1
    assert (
        "no prediction for 1 of 2 items, such as d; each counts as the" in capsys.readouterr().err
    )
    predictions.write_text('{"id": "e", "answer": "A man.", "raw_output": "A man."}\n')
    assert run("j.jsonl") == 1
    assert "no predictions at all for the 2 items of caption" in capsys.readouterr().err
    (tmp_path / "asr.jsonl").write_text('{"audio": "c.wav", "text": "x"}\n')
    assert run("j.jsonl", "asr", tmp_path / "asr.jsonl") == 2
    assert "asr needs no judge" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected http"):
        Judge("localhost:8000", "m")
