"""Text in the form in which it is compared, and the error rates of that."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.metrics import caption
from moss_audio_jax.evaluate.metrics.error_rate import errors, transcript_errors
from moss_audio_jax.evaluate.text_norm import chinese, plain_units, rules_for, units


@pytest.mark.parametrize(
    "forms",
    [
        "二十三 23 ２３ 貳拾叁",
        "三百五 350 三百五十",
        "三百零五 305",
        "三万五千 3万5千 35000 35,000",
        "三十五万 35万 350000",
        "一点五亿 1.5亿 150000000",
        "一千万 1000万 1千万",
        "两个 2个",
        "二零零八年八月八日 2008年8月8日 2008年08月08日 2008-08-08 2008/8/8",
        "九八年 98年",
        "一三八零零幺 138001",
        "百分之五点五 5.5% ５．５％",
        "百分之百 100%",
        "三分之一 1/3",
        "三点一四 3.14",
        "三点五分 3:05 3点05分",
        "三点半 3:30 三点三十分",
        "三点 3:00 3点",
        "负五度 -5度",
        "五美元 $5",
        "一百元 ￥100 ¥１００",
        "二十五摄氏度 25℃",
        "你好世界 你好，世界！ 「你好」世界……",
        "播放mp3吧 播放ＭＰ３吧。",
    ],
)
def test_chinese_forms_that_are_one(forms):
    found = {chinese(form) for form in forms.split()}
    assert len(found) == 1, found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("花儿", "花"),  # erhua is heard
        ("二三个", "二十三个"),
        ("三点五", "三点五分"),
        ("三百五", "三百零五"),
        ("八月八号", "八月八日"),
        ("万一", "10001"),
        ("是的", "时的"),
    ],
)
def test_chinese_forms_that_differ(one, other):
    assert chinese(one) != chinese(other)


def spoken(number: int) -> str:
    """A number below 10**8 in Chinese, written here anew."""
    names = "零一二三四五六七八九"
    if number >= 10**4:
        high, low = divmod(number, 10**4)
        gap = "零" if 0 < low < 1000 else ""
        return spoken(high) + "万" + gap + (spoken(low) if low else "")
    text = ""
    for size, sign in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // size % 10
        if digit:
            text += names[digit] + sign
        elif text and not text.endswith("零"):
            text += "零"
    return text.rstrip("零") or "零"


def test_chinese_numbers():
    draw = random.Random(0)
    for number in [*range(2000), *(draw.randrange(10 ** draw.randint(4, 8)) for _ in range(3000))]:
        assert chinese(spoken(number)) == str(number), spoken(number)
    assert chinese("十") == "10"
    assert chinese("十二") == "12"


@given(
    st.text(
        "一二三四五六七八九十百千万亿零两幺点分之年月日号:：.,%-/$¥0123456789ab儿 你好。",
        max_size=14,
    )
)
def test_chinese_never_fails_and_leaves_no_spaces_in_it(text):
    result = chinese(text)
    assert result == " ".join(result.split())
    assert "你 " not in result
    assert "," not in result


def test_units():
    assert units(chinese("我用 iPhone 拍了 25 张"), "chinese") == [*"我用", "iphone", *"拍了25张"]
    assert units("hello world", "english") == ["hello", "world"]
    assert units("say 你好 twice", "english") == ["say", "你", "好", "twice"]
    assert plain_units("Don't STOP, now…") == ["dont", "stop", "now"]
    assert plain_units("今天OK！") == ["今", "天", "ok"]
    assert rules_for("anything", "zh-CN") == "chinese"
    assert rules_for("你好", None) == "chinese"
    assert rules_for("hello", None) == "english"
    assert rules_for("bonjour", "fr_fr") == "basic"


def test_identity_changes_with_the_rules(tmp_path, monkeypatch):
    before = text_norm.identity()
    assert before["version"] == text_norm.VERSION
    assert len(before["hash"]) == 16
    other = tmp_path / "text_norm.py"
    other.write_text("VERSION = 2")
    monkeypatch.setattr(text_norm, "__file__", str(other))
    text_norm.identity.cache_clear()
    assert text_norm.identity()["hash"] != before["hash"]
    monkeypatch.undo()
    text_norm.identity.cache_clear()


def test_english_is_whispers():
    english = pytest.importorskip("whisper_normalizer.english", reason="extra `evaluate`")
    oracle = english.EnglishTextNormalizer()
    for text in (
        "Mr. Smith won't pay twenty-five dollars, he's said.", "[noise] Um, the colour (red) of it",
        "I've got $20 million and 3,000 cats' 1st.", "y'all wanna go; can't   you?", "",
    ):  # fmt: skip
        assert text_norm.normalise(text, "english") == " ".join(oracle(text).split())
    assert text_norm.normalise("Ça va, Élise ?", "basic") == "ça va élise"


def test_error_rates_are_jiwers():
    jiwer = pytest.importorskip("jiwer", reason="the oracle; extra `test`")
    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "你", "好", "twenty"]
    references, hypotheses, found = [], [], []
    for _ in range(300):
        reference = [draw.choice(words) for _ in range(draw.randint(1, 12))]
        hypothesis = [w for w in reference if draw.random() > 0.15]
        hypothesis = [draw.choice(words) if draw.random() < 0.2 else w for w in hypothesis]
        hypothesis += [draw.choice(words) for _ in range(draw.choice([0, 0, 2]))]
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis))
        found.append(errors(reference, hypothesis))
    expected = jiwer.process_words(references, hypotheses)
    assert sum(e.substitutions for e in found) == expected.substitutions
    assert sum(e.deletions for e in found) == expected.deletions
    assert sum(e.insertions for e in found) == expected.insertions
    total = sum(e.total for e in found) / sum(e.reference for e in found)
    assert total == pytest.approx(expected.wer, rel=1e-12)
    characters = [errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    total = sum(e.total for e in characters) / sum(e.reference for e in characters)
    assert total == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-12)


def test_transcripts():
    pytest.importorskip("rapidfuzz", reason="error rates need the extra `evaluate`")
    words, characters = transcript_errors("今天二十三度。", "今天23度", "zh")
    assert words == characters == (0, 0, 0, 5)
    words, _ = transcript_errors("我 用 Python 写 代 码", "我用Java写代", None)
    assert words == (1, 1, 0, 6)
    words, characters = transcript_errors("你好", "", "zh")
    assert (words.deletions, characters.deletions) == (2, 2)
    assert transcript_errors("", "噪音", "zh")[0] == (0, 0, 2, 0)


def test_caption_fields():
    said = (
        'Sure:\n```json\n{"Gender": "Female", "age": 30, "tone": ["calm", "warm"], "x": null}\n```'
    )
    fields = caption.read_fields(said)
    assert fields == {"gender": "Female", "age": "30", "tone": "calm, warm"}
    assert caption.read_fields("{no json} here") is None
    assert caption.field_score("female", "Female.") == 1
    assert caption.field_score("calm and warm", "warm") == pytest.approx(2 / 4)
    assert caption.field_score("calm", None) == 0
    sources = [["man", "male"], ["dog barking"], ["piano"]]
    assert caption.named(sources, "A woman plays Piano; a dog, barking. No males.") == 2
