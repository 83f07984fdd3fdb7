"""One server, three models: the small one, adapters of its decoder, and adapters of its encoder.

Each answers as `MossAudio.load(lora=...)` does alone, whatever the others do.
"""

from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
from adapters import write_adapters
from served import serving, user

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.models.cache import PAGE
from moss_audio_jax.models.lora import ENCODER
from moss_audio_jax.text.tasks import TRANSCRIBE

DEMO = DEFAULT_CHECKPOINT.parent / "demo"
QUESTION = "Which instruments are playing?"
MOST = 24  # tokens
MODELS = ("small", "team/talk", "ears")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("lora"), mj.MossAudio.load().config
    targets = r"language_model/layers/mlp/up_proj"
    return {
        "small": None,
        "team/talk": write_adapters(folder / "decoder", config, targets, size=4.0),
        "ears": write_adapters(folder / "encoder", config, ENCODER, size=6.0),
    }


@pytest.fixture(scope="module")
def alone(folders):
    """Each model by itself."""
    return {name: mj.MossAudio.load(lora=folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def served(folders):
    lora = [(name, folder) for name, folder in folders.items() if folder]
    with serving(mj.MossAudio.load(), lora=lora) as server:
        yield server


@pytest.fixture(scope="module")
def band():
    return (DEMO / "trumpet_band.flac").read_bytes()


def chat(served, model, *messages, **options):
    asked = {"model": model, "messages": list(messages), "max_tokens": MOST} | options
    return served.openai().chat.completions.create(**asked)


def numbers(served, name):
    """The engines' numbers of this name, by model."""
    text = served.http().get("/metrics").text
    found = re.findall(rf'^moss_audio_{name}\{{model="(.*)"\}} (\S+)', text, re.MULTILINE)
    return {model: float(number) for model, number in found}


def test_the_list_of_models(served):
    base, other, *adapters = served.openai().models.list().data
    assert (base.id, base.parent, base.root) == ("small", None, "small")
    assert (other.id, other.parent) == ("whisper-1", None)
    for found, name in zip(adapters, ("team/talk", "ears"), strict=True):
        assert (found.id, found.parent, found.root) == (name, "small", "small")
        with served.http() as http:
            assert http.get(f"/v1/models/{name}").json() == found.to_dict()
    with pytest.raises(openai.NotFoundError, match="team/talk or ears") as raised:
        chat(served, "talk", user("hi"))
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_each_answers_as_if_alone_and_at_once(served, alone, band):
    asked = [name for name in MODELS for _ in range(3)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [*pool.map(lambda name: chat(served, name, user(QUESTION, band)), asked)]
    expected = {
        name: model.generate(QUESTION, [DEMO / "trumpet_band.flac"], max_new_tokens=MOST)
        for name, model in alone.items()
    }
    for name, answer in zip(asked, answers, strict=True):
        assert answer.model == name
        assert answer.choices[0].message.content == expected[name].text
        assert answer.usage.completion_tokens == len(expected[name].ids)
    assert len({reply.text for reply in expected.values()}) == 3
    stream = chat(served, "ears", user(QUESTION, band), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected["ears"].text


def test_a_clip_is_heard_once_for_all_that_have_the_same_ears(served):
    """Also by metrics, which count each engine's work under its model's name."""
    rng = np.random.default_rng(0)
    wav = (0.1 * rng.standard_normal(5 * 16_000)).astype(np.float32)
    with served.http() as http:

        def ask(name):
            content = [
                {"type": "text", "text": QUESTION},
                {"type": "input_audio", "input_audio": {"data": encoded(wav), "format": "wav"}},
            ]
            body = {"model": name, "messages": [{"role": "user", "content": content}]}
            assert http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).is_success

        before = numbers(served, "encoded_seconds_total")
        assert set(before) == {"small", "ears"}  # team/talk hears with the base's
        new = []
        for name in ("team/talk", "small", "ears", "ears"):
            ask(name)
            now = numbers(served, "encoded_seconds_total")
            new.append((now["small"] - before["small"], now["ears"] - before["ears"]))
    assert new == [(5, 0), (5, 0), (5, 5), (5, 5)]
    assert numbers(served, "engine_alive") == dict.fromkeys(MODELS, 1.0)
    assert all(count > 0 for count in numbers(served, "prompt_tokens_total").values())


def encoded(wav) -> str:

    held = io.BytesIO()
    soundfile.write(held, wav, 16_000, format="WAV", subtype="FLOAT")
    return base64.b64encode(held.getvalue()).decode()


@pytest.mark.parametrize("name", MODELS)
def test_transcripts(served, alone, name):
    file = DEMO / "two_people.flac"
    expected = mj.transcribe(alone[name], file, batch_size=1)
    answer = served.openai().audio.transcriptions.create(model=name, file=file)
    assert answer.text == expected.text
    assert getattr(answer, "warnings", []) == expected.problems


def test_live_sound(served, alone):
    """The address says who answers and transcribes; `session.update` may say it anew."""
    wav = mj.load_audio(DEMO / "two_people.flac")
    pcm = np.round(wav * 32767).astype("<i2")
    heard = pcm.astype(np.float32) / 2**15
    data = base64.b64encode(pcm.tobytes()).decode()
    transcripts = {
        name: model.generate(TRANSCRIBE["none"], [heard]).text for name, model in alone.items()
    }
    done = "conversation.item.input_audio_transcription.completed"
    with served.openai().realtime.connect(model="team/talk") as live:

        def until(kind):
            for event in live:
                assert event.type != "error", event
                if event.type == kind:
                    return event

        for name in ("team/talk", "ears"):
            audio = {"format": {"type": "audio/pcm", "rate": 16_000}}
            if name == "ears":
                audio["transcription"] = {"model": "ears"}
            live.session.update(session={"type": "realtime", "audio": {"input": audio}})
            until("session.updated")
            live.input_audio_buffer.append(audio=data)
            live.input_audio_buffer.commit()
            assert until(done).transcript == transcripts[name]
        for name in ("team/talk", "small"):  # what answers is not what transcribes
            if name == "small":
                live.session.update(session={"type": "realtime", "model": name})
                assert until("session.updated").session.model == name
            fields = {"instructions": QUESTION, "max_output_tokens": MOST}
            live.response.create(response=fields)
            response = until("response.done").response
            reply = alone[name].generate(QUESTION, [heard], max_new_tokens=MOST)
            assert response.output[0].content[0].text == reply.text
            assert response.usage.input_token_details.cached_tokens >= 0
    assert len(set(transcripts.values())) == 3


def test_tokens_that_were_kept(served, band):
    """What the prompt shares with an earlier one, in whole pages, if it went to the same model."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    messages = [{"role": "system", "content": "Be brief, and say nothing twice."}]
    messages.append(user("Which sounds are there, and in which order?", band))
    first = chat(served, "small", *messages).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    *_, last = chat(served, "small", *messages, **options)
    kept = (first.prompt_tokens - 1) // PAGE * PAGE
    assert last.usage.prompt_tokens_details.cached_tokens == kept > 0
    other = chat(served, "team/talk", *messages, n=2).usage
    assert other.prompt_tokens == first.prompt_tokens
    assert other.prompt_tokens_details.cached_tokens == 0


def test_a_server_is_not_ready_if_one_engine_has_died(served, monkeypatch):
    service = served.state.adapters["ears"]
    monkeypatch.setattr(service, "dead", RuntimeError("gone"))
    reply = httpx.get(f"{served.url}/ready")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert numbers(served, "engine_alive") == {"small": 1, "team/talk": 1, "ears": 0}
