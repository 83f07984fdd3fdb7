"""The page of a run's rollouts; how it looks is not tested."""

import json
import re

from moss_audio_jax.post_train.page import PAGE, write_page


def line(step, row, answer, reward, question="How many <barks>?"):
    return {
        "step": step,
        "row": row,
        "index": 0,
        "id": f"id-{row}",
        "task": "count",
        "question": question,
        "expected": "3",
        "answer": answer,
        "tokens": len(answer),
        "finish_reason": "stop" if reward else "length",
        "reward": reward,
        "parts": {"number": [reward, "right" if reward else "read as 2"]},
        "learned": True,
    }


def write(folder, metrics, lines):
    for name, rows in (("metrics", metrics), ("rollouts", lines)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text + '{"step": 9, "half')


def test_curves_and_the_answers_over_time(tmp_path):
    write_page(tmp_path)
    assert not (tmp_path / PAGE).exists()  # nothing was sampled yet
    metrics = [
        {"step": step, "reward": step / 1000, "reward/number": 0.5, "policy/capped": 0.0}
        for step in range(1, 1001)
    ]
    lines = [line(step, "a", "<b>2</b>", 0.0) for step in (1, 1, 1)]
    lines += [line(1, "b", "3", 1.0), *(line(step, "a", "x" * 2000, 1.0) for step in (7, 7))]
    lines += [line(7, "a", "3", 1.0), line(7, "a", "3", 1.0, "Another?")]
    write(tmp_path, metrics, lines)
    write_page(tmp_path)
    page = (tmp_path / PAGE).read_text()
    drawn = re.findall(r"<title>([^<]*): (\S+) → (\S+)</title>.*?points=\"([^\"]*)\"", page)
    assert [name for name, *_ in drawn] == ["reward"]
    assert "The same at every step: reward/number 0.5</small>" in page
    # 1,000 steps are 334 points, each the mean of three.
    assert drawn[0][1:3] == ("0.002", "1")
    assert len(drawn[0][3].split()) == 334
    assert "1 of 3 questions came up more than once." in page
    assert page.count("<details>") == 1
    assert "0.00 → 1.00" in page
    assert "&lt;barks&gt;" in page
    shown = (
        '<td class="count">3</td><td class="reward">0.00</td><td><bdi>&lt;b&gt;2&lt;/b&gt;</bdi>'
    )
    assert shown + " <small>(length)" in page
    assert "number 0: read as 2" in page
    assert "x [... 1,300 characters]" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file


def test_a_page_of_questions_asked_once(tmp_path):
    write(tmp_path, [{"step": 1, "reward": 1.0}], [line(1, "a", "3", 1.0)])
    write_page(tmp_path)
    assert "None came up more than once so far." in (tmp_path / PAGE).read_text()


def test_the_steps_of_a_question_are_spread(tmp_path):
    write(tmp_path, [], [line(step, "a", "3", 1.0) for step in range(1, 101)])
    write_page(tmp_path)
    page = (tmp_path / PAGE).read_text()
    shown = [int(step) for step in re.findall(r">step (\d+)<br>", page)]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (1, 100)
