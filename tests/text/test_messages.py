"""Conversations in OpenAI's form: what is taken, what is refused, and where the fault is."""

import base64
import io

import numpy as np
import pytest

from moss_audio_jax.errors import InputError
from moss_audio_jax.text.messages import from_openai

DATA = base64.b64encode(b"sound").decode()
TEXT = {"type": "text", "text": "What is heard?"}
SOUND = {"type": "input_audio", "input_audio": {"data": DATA, "format": "mp3"}}
URL = {"type": "audio_url", "audio_url": {"url": f"data:audio/ogg;base64,{DATA}"}}


def said(*messages):
    return [(m["role"], m["message_type"], m["content"]) for m in from_openai(messages).messages]


def test_turns_of_every_role():
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [TEXT, SOUND, URL], "name": "Ann"},
        {"role": "assistant", "content": [{"type": "text", "text": "A bell."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
        {"role": "user", "content": "Why?"},
    ]
    assert said(*conversation) == [
        ("system", "text", "Be brief."),
        ("user", "text", "What is heard?"),
        ("user", "audio", "clip 1"),
        ("user", "audio", "clip 2"),
        ("assistant", "text", "A bell."),
        ("assistant", "text", "No more."),
        ("user", "text", "Why?"),
    ]
    clips = from_openai(conversation).clips
    assert [clip.getvalue() for clip in clips] == [b"sound", b"sound"]
    assert all(type(clip) is io.BytesIO for clip in clips)


def test_a_clip_in_python_is_what_it_is():
    wav = np.zeros(1600, np.float32)
    parts = [{"type": "audio", "audio": wav}, {"type": "audio", "audio": "a.wav"}, TEXT]
    clips = from_openai([{"role": "user", "content": parts}]).clips
    assert clips[0] is wav
    assert clips[1] == "a.wav"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hello", "messages is a str"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] is a str"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role is 'tool'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role is list"),
        ([{"role": "user"}], r"messages\[0\].content is None"),
        ([{"role": "user", "content": []}], r"messages\[0\].content is empty"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\].content is bytes"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is a str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\].type is 'image"),
        ([{"role": "user", "content": [{"type": {}}]}], r"content\[0\].type is dict"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"\[0\].text is 3"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input_audio is missing"),
        (
            [{"role": "user", "content": [TEXT, {"type": "input_audio", "input_audio": DATA}]}],
            r"content\[1\].input_audio.data is None",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}],
            "not base64",
        ),
        (
            [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "/etc/x"}}]}],
            "nothing is fetched",
        ),
        ([{"role": "system", "content": [SOUND]}], "sound of the system"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "calls no tools",
        ),
    ],
)
def test_what_cannot_be_used_is_named(messages, fault):
    with pytest.raises(InputError, match=fault):
        from_openai(messages)
