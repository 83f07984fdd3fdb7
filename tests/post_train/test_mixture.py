"""Mixtures: the total, what each task is paid by, tricks against the shipped ones, plug-ins."""

import collections
import http.server
import importlib.metadata
import json
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from reward_rows import ROWS, hacks, row, said
from world_helpers import needs_espeak

from moss_audio_jax import world
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.post_train.asked import TASKS, Said, read
from moss_audio_jax.post_train.mixture import (
    GROUP,
    check,
    default_options,
    default_rewards,
    mixture,
)


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_mixtures_pay_for_answers_alone(name):
    pay, asked = mixture(default_rewards()), ROWS[name]
    own = pay(said(asked["conversation"][-1]["content"]), asked)
    assert own.total == pytest.approx(1)
    assert {"format", "length", "repetition", "language"} < own.parts.keys()
    tricks = hacks(asked)
    answer = read(asked).answer
    if read(asked).thinks:
        tricks |= {
            "right after an empty block": said(f"<think>\n\n</think>\n\n{answer}"),
            "right without a block": said(answer),
            "right after half a block": said(f"thoughts\n</think>\n\n{answer}"),
            "a tag in the answer": said(f"<think>\nHm.\n</think>\n\n{answer}</think>"),
        }
    else:
        tricks["unasked thoughts"] = said(f"<think>\nHm.\n</think>\n\n{answer}")
    paid = {trick: judged for trick, each in tricks.items() if (judged := pay(each, asked)).total}
    assert not paid, paid


def test_shipped_mixtures_cover_the_kinds_that_need_no_judge():
    rewards = default_rewards()
    assert check(ROWS.values(), mixture(rewards)) == len(ROWS)
    assert {read(each).kind for each in ROWS.values()} == set(rewards)


@needs_espeak
def test_every_task_of_a_world_is_known_and_its_own_answer_earns_all():
    pay, seen = mixture(default_rewards()), collections.Counter()
    for number in range(40):
        for each in world.rows(world.scene(number, split="train", seed=0).labels, "a.wav"):
            seen[each["task"]] += 1
            assert each["task"] in TASKS | {"caption"}
            if read(each).kind == "caption":
                with pytest.raises(InputError, match="no rewards for task caption"):
                    pay(said("a dog barks"), each)
                continue
            raw = each["conversation"][-1]["content"]
            assert pay(Said(raw, tokens=1), each).total == pytest.approx(1), each
            if seen[each["task"]] <= 2:
                paid = {k: v for k, v in hacks(each).items() if pay(v, each).total}
                assert not paid, (each, paid)
    folder = Path(world.__file__).parent
    source = "".join((folder / name).read_text() for name in ("questions.py", "reasoning.py"))
    made = set(re.findall(r"(?:Question|Reasoned|_choice)\(\s*\"(\w+)\"", source))
    assert len(made) > 30
    assert made <= TASKS


@pytest.mark.parametrize("name", ROWS)
def test_anything_that_is_said_has_a_total(name):
    pay, draw = mixture(default_rewards()), random.Random(name)
    pieces = [
        "<think>",
        "</think>",
        "\n",
        " ",
        "[0.10]",
        "[99:99]",
        "9" * 5000,
        "\ud800",
        "\0",
        "{",
        "}",
    ]
    pieces += [
        '{"gender": [[',
        "A",
        "B.",
        "0.1 - 4.0:",
        "dog",
        "狗",
        "-",
        ROWS[name]["id"],
        "a" * 9999,
    ]
    for _ in range(15):
        raw = "".join(draw.choices(pieces, k=draw.randint(1, 60)))
        judged = pay(said(raw), ROWS[name])
        assert 0 <= judged.total <= 1
        for part in judged.parts.values():
            assert 0 <= part.value <= 1
            assert len(part.reason) < 300


def test_the_total_is_the_mean_of_content_and_manner_takes_away():
    pay = mixture(
        {"asr": {"wer": 3, "exact": 1, "format": 0.5, "length": 1.0, "language": 0.0}},
        {"length": {"longest": 10, "margin": 5}},
    )
    asked = row("asr", "Write.", "a dog barks twice")
    judged = pay(Said("a dog barks once", tokens=7), asked)
    assert judged.entry == "asr"
    assert {name: part.value for name, part in judged.parts.items()} == pytest.approx(
        {"wer": 0.75, "exact": 0, "format": 1, "length": 0.6, "language": 1}
    )
    assert judged.total == pytest.approx((3 * 0.75 + 0) / 4 * 0.6)
    tagged = pay(Said("<think>\nHm.\n</think>\n\na dog barks twice", tokens=2), asked)
    assert tagged.total == pytest.approx(0.5)
    foreign = pay(Said("狗叫两次", tokens=2), asked)
    assert foreign.parts["language"].value == 0  # logged alone
    assert pay(Said("", tokens=0), asked).total == 0


def test_an_entry_is_found_by_task_then_kind_then_default():
    pay = mixture({"count": {"exact": 1.0}, "number": {"number": 1.0}, "default": {"wer": 1.0}})
    mine = row("my task", "Say it.", "hello")
    found = [pay(said("1"), each).entry for each in (ROWS["count"], ROWS["tempo"], mine)]
    assert found == ["count", "number", "default"]
    assert pay(said("1"), {**mine, "task": None}).entry == "default"
    silent = row("asr", "Transcribe the audio.", "There is no speech.")
    assert mixture(default_rewards())(said("there is no speech"), silent).entry == "text"


def test_check_names_the_row_and_what_is_known():
    pay = mixture(default_rewards())
    with pytest.raises(InputError) as error:
        check([ROWS["count"], row("cuont", "How many?", "3"), row("x", "y", "z")], pay)
    said_ = str(error.value)
    assert said_.startswith("row 'cuont-1': unknown task 'cuont'; expected one of absent, ")
    assert "count, " in said_
    assert said_.endswith("(1 more of 3 have problems)")
    assert check([ROWS["count"], row("x", "y", "z")], pay, 0.5) == 2
    with pytest.raises(InputError, match="row 'line 2': unknown task"):
        check([ROWS["count"], row("x", "y", "z", id=None)], pay)
    with pytest.raises(InputError, match="no task; expected one of asr, choice, "):
        check([{**ROWS["count"], "task": None}], pay)
    with pytest.raises(InputError, match="has no times"):
        check([row("events", "List.", "a dog barks")], pay)
    with pytest.raises(InputError, match="its expected answer earns nothing by aas: no time of a"):
        check([row("words", "List.", "[0.10]...[0.20]")], pay)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ({"choice": {"chioce": 1.0}}, "no reward 'chioce'; expected one of exact, choice, "),
        ({"choice": {"format": 1.0}}, "rewards.choice: nothing says whether an answer is right"),
        ({"choice": {"choice": 0.0}}, "nothing says"),
        ({"choice": {"choice": -1}}, "rewards.choice.choice is -1; expected a number from 0"),
        ({"choice": {"choice": True}}, "is True"),
        ({"choice": {"choice": float("nan")}}, "is nan"),
        ({"choice": {"choice": float("inf")}}, "is inf"),
        (
            {"choice": {"choice": 1.0, "format": 2.0}},
            "format is 2.0; expected a number from 0 to 1",
        ),
        ({"text": {"judge": 1.0}}, "judge url ''"),
    ],
)
def test_a_wrong_mixture_is_refused(rewards, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        mixture(rewards)


@pytest.mark.parametrize(
    "options", [{"lenght": {}}, {"length": {"most": 3}}, {"length": {"margin": "x"}}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError, match="options of rewards"):
        mixture(default_rewards(), options)


def test_configs_work_as_they_are():
    rewards, options = default_rewards(), default_options()
    rewards.choice.format = 0.5
    options.length.longest = 64
    options.length.margin = 16
    pay = mixture(ConfigDict(rewards), options)
    assert pay(Said("C", tokens=56), ROWS["choice_letter"]).total == pytest.approx(0.5)


@pytest.fixture
def plug_in(monkeypatch):
    """plug_in(value): makes an entry point whose function returns it, or raises it."""

    def install(value):
        class Point:
            def load(self):
                if isinstance(value, ImportError):
                    raise value
                return self.answer

            @staticmethod
            def answer(said, row):
                row.clear()
                if isinstance(value, Exception):
                    raise value
                return value

        real = importlib.metadata.entry_points

        def entry_points(**given):
            mine = given == {"group": GROUP, "name": "mine"}
            return (Point(),) if mine else real(**given)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


def test_a_plug_in_is_content(plug_in):
    plug_in((0.5, "so so"))
    pay = mixture({"text": {"mine": 1.0, "exact": 1.0}})
    judged = pay(said("the man"), ROWS["who_said"])
    assert judged.total == pytest.approx(0.75)
    assert judged.parts["mine"] == (0.5, "so so")
    for trick, tried in hacks(ROWS["who_said"]).items():
        if not trick.startswith("everything"):  # what is right the plug-in alone knows
            assert pay(tried, ROWS["who_said"]).total == 0, trick


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((1.5, "much"), "1.5 (float) for row 'who_said-1'; expected a number from"),
        ((float("nan"), ""), "nan (float) for row"),
        ((True, ""), "True (bool) for row"),
        (("1", ""), "'1' (str) for row"),
        (([1.0], ""), "[1.0] (list) for row"),
        (None, "failed on row 'who_said-1' (TypeError"),
        (RuntimeError("out of ideas"), "failed on row 'who_said-1' (RuntimeError: out of ideas)"),
    ],
)
def test_a_faulty_plug_in_is_named(plug_in, value, words):
    plug_in(value)
    pay = mixture({"text": {"mine": 1.0}})
    with pytest.raises(InputError, match=re.escape(words)) as error:
        pay(said("the man"), ROWS["who_said"])
    assert str(error.value).startswith("reward 'mine': ")


def test_a_plug_in_may_give_numpys_numbers_and_change_its_row(plug_in):
    plug_in((np.float32(0.5), "half"))
    assert mixture({"text": {"mine": 1.0}})(said("the man"), ROWS["who_said"]).total == 0.5
    assert ROWS["who_said"]["conversation"]


def test_a_plug_in_that_cannot_be_imported_is_named(plug_in):
    plug_in(ImportError("no module"))
    with pytest.raises(InputError, match=r"reward 'mine': .*ImportError: no module"):
        mixture({"text": {"mine": 1.0}})


def test_a_judge_is_asked_through_the_client():
    asked = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body["model"], body["messages"][0]["content"]))
            self.send_response(200)
            self.end_headers()
            message = {"role": "assistant", "content": '{"answer": 3}'}
            self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        pay = mixture({"caption": {"judge": 1.0}}, {"judge": {"url": url, "model": "m"}})
        captioned = row("caption", "Describe this audio.", "A dog barks.")
        assert check([captioned], pay) == 1
        assert not asked
        judged = pay(said("A hound is heard."), captioned)
        server.shutdown()
        thread.join()
    assert judged.total == 0.5
    assert asked[0][:2] == ("/v1/chat/completions", "m")
    assert "Answer to judge:\nA hound is heard." in asked[0][2]
