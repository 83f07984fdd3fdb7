"""The page at `/`, in the system's Chromium without a window, and its files without one.

What a screen reader says and how the page looks is not tested.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import time
from pathlib import Path

import httpx
import pytest
import soundfile
from scripted import Scripted
from served import listening, serving

import moss_audio_jax as mj
from moss_audio_jax import serve
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.serve.app import make_app
from moss_audio_jax.serve.pages import FILES
from moss_audio_jax.serve.state import State

CLIP = DEFAULT_CHECKPOINT.parent / "demo" / "two_people.flac"
FOLDER = Path(serve.__file__).parent / "page"
EVENTS = "List all that is heard, one per line, as start - end: description"
KEY = "a-key-for-tests"
SECONDS = 60.0  # in which the page must do what it is asked to


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load()


# --- without a browser ---------------------------------------------------------------------------


def test_the_files_are_served_and_ask_for_nothing_else(model):
    """They need no key; what they ask for does."""

    async def get() -> dict[str, httpx.Response]:
        state = State(model, Scripted(), ["small"])
        transport = httpx.ASGITransport(make_app(state, [KEY]))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = [*FILES, "/v1/models", "/page/page.js", "/..%2fapp.py"]
            got = {path: await client.get(path) for path in paths}
        state.close()
        return got

    got = asyncio.run(get())
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    for path, (name, _) in FILES.items():
        reply = got.pop(path)
        assert (reply.status_code, reply.text) == (200, (FOLDER / name).read_text())
        assert reply.headers["content-type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "*" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(https?:)?//[\w-]+\.\w|@import|url\(", reply.text)
        assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! src=)", reply.text)
    assert {file.name for file in FOLDER.iterdir()} == {name for name, _ in FILES.values()}
    assert {reply.status_code for reply in got.values()} == {401}


# --- in a browser --------------------------------------------------------------------------------


class Page:
    """A browser with the page."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(f"{url}/")

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def run(self, script: str, *given):
        return self.driver.execute_script(script, *given)

    def awaited(self, script: str, *given):
        """The value of an asynchronous expression; arguments are `given`."""
        return self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1], given = arguments;"
            f"(async () => {script})().then(done, error => done(String(error)))",
            *given,
        )

    def until(self, true) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.02)

    def drop(self, file: Path) -> None:
        """Drops a file on the page, as a mouse does."""
        self.run(
            """
            const [name, data] = arguments;
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            const options = { bubbles: true, cancelable: true, dataTransfer };
            for (const kind of ["dragover", "drop"]) {
              document.querySelector("main").dispatchEvent(new DragEvent(kind, options));
            }
            """,
            file.name,
            base64.b64encode(file.read_bytes()).decode(),
        )
        self.until(lambda: " s" in self.text("#about"))

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def ask(self, question: str) -> str:
        """The answer, when all of it has come."""
        before = len(self.all(".turn.model"))
        self.one("#question").send_keys(question)
        self.click("#ask")
        self.until(lambda: len(self.all(".turn.model:not([aria-busy])")) == before + 1)
        return self.run("return [...document.querySelectorAll('.said')].at(-1).textContent")

    def transcribe(self) -> list[str]:
        self.click("#transcribe")
        self.until(lambda: self.all(".words .bars button"))
        return [bar.get_attribute("textContent") for bar in self.all(".words .bars button")]

    def now(self) -> float:
        return self.run("return document.getElementById('player').currentTime")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on this machine")
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    wav, rate = soundfile.read(CLIP)
    soundfile.write(spoken, wav, rate, subtype="PCM_16")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1100,900",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(SECONDS)
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def served(page, model):
    with serving(model) as server:
        yield server


@pytest.fixture
def opened(page, served):
    """The page, freshly opened; at its end the browser must have nothing to complain about."""
    page.open(served.url)
    page.until(lambda: page.text("#model") == "small")
    yield page
    assert page.complaints() == []


def encoded_seconds(served) -> float:
    """Seconds of sound that the server has encoded."""
    text = served.http().get("/metrics").text
    return float(re.search(r"^moss_audio_encoded_seconds_total\{.*\} (\S+)", text, re.MULTILINE)[1])


def test_a_conversation(opened, served, model):
    """A file is dropped, transcribed and asked about; later turns hear nothing again."""
    page = opened
    page.drop(CLIP)
    assert page.text("#about") == "two_people.flac, 5.7 s"
    words = page.transcribe()
    assert words == [s.text for s in mj.transcribe(model, CLIP, "word").segments]
    first = page.ask(EVENTS)
    assert first == model.generate(EVENTS, [CLIP]).text
    bars = [bar.get_attribute("title") for bar in page.all(".events .bars button")]
    expected = [f"{s.start:.2f} - {s.end:.2f}: {s.text}" for s in mj.parse_timestamps(first)]
    assert bars == expected != []

    before = encoded_seconds(served)
    assert before > 0
    question = "What do the speakers say?"
    second = page.ask(question)
    assert encoded_seconds(served) == before
    clip = {"type": "audio", "audio": CLIP}
    asked = [{"role": "user", "content": [clip, {"type": "text", "text": EVENTS}]}]
    asked.append({"role": "assistant", "content": first})
    asked.append({"role": "user", "content": question})
    assert second == model.generate(messages=asked).text
    assert not page.one("#error").is_displayed()

    page.click("#fresh")
    assert page.all(".turn") == []
    assert page.all(".words .bars button") != []  # they are of the sound, not of the conversation


def test_times_lead_to_the_sound(opened):
    """Words, times in a transcript and in an answer, the spectrogram, and its keys."""
    page = opened
    page.drop(CLIP)
    page.until(lambda: page.run("return document.getElementById('player').readyState") >= 2)
    drawn = """
        const canvas = document.getElementById("picture");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(data).size"""
    page.until(lambda: page.run(drawn) > 100)
    words = page.transcribe()
    player = "const player = document.getElementById('player');"
    for selector, low in (
        (f".words .bars button:nth-child({words.index('nephew') + 1})", 2.8),
        ("#transcript p:nth-of-type(2) a", 2.6),
        ("#picture", 2.7),
    ):
        page.run(f"{player} player.pause(); player.currentTime = 0")
        page.click(selector)  # in the middle of it
        page.until(lambda low=low: page.now() > low)
        assert page.now() < low + 1.5
        assert not page.run(f"{player} return player.paused")
    page.run(f"{player} player.pause(); player.currentTime = 1")
    page.one("#picture").send_keys("\ue014")  # arrow to the right
    page.until(lambda: page.now() == 2)
    page.until(lambda: page.one("#picture").get_attribute("aria-valuenow") == "2.0")
    first = page.one(".words .bars button")
    first.send_keys("\ue014")
    assert page.run("return document.activeElement.textContent") == words[1]


def test_a_recording(opened):
    """From a microphone that plays the clip again and again."""
    page = opened
    page.click("#record")
    page.until(lambda: "(4 s)" in page.text("#record"))
    page.click("#record")
    page.until(lambda: " s" in page.text("#about"))
    assert 3 < float(re.fullmatch(r"recording\.wav, (\d+\.\d) s", page.text("#about"))[1]) < 9
    heard = set(page.transcribe())
    assert heard & {"fox", "desert", "nephew", "fifteen", "years"}
    assert "speaking" in page.ask(EVENTS)


TEXTS = (
    "[0.45]the[0.58][0.58]fox[0.97][1.08]in[1.23]",
    "0.45 - 1.83: woman speaking\n2.71 - 5.33: man speaking",
    '00:03 - 00:05.5: a dog\n- 1:00 - 1:02: a "cat" <b> & --> x',
    "[00:01]one[00:02]two[00:02]",
    "There is no speech.",
    "The first 3 of 5 people, 12 - 15 years old.",
)


def test_times_and_files_are_those_of_python(opened):
    page = opened
    for text in TEXTS:
        true = [vars(s) for s in mj.parse_timestamps(text)]
        read = "{ return (await import('/times.js')).segments(given[0]) }"
        assert page.awaited(read, text) == true
    odd = [
        (0, 1.5, 'a "b"'),
        (1.0, 2.0, "c & <d>"),
        (2.5, 2.5, "e"),
        (2.5, 3661.25, "f --> g\n\nh"),
    ]
    for rows in (odd, [(0.0004, 0.25, "é 你")], []):
        segments = [mj.Segment(*row) for row in rows]
        given = [vars(s) for s in segments]
        write = "{ return (await import('/times.js')).WRITERS[given[0]](given[1], given[2]) }"
        for form, wanted in {
            "srt": mj.to_srt(segments),
            "vtt": mj.to_vtt(segments),
            "TextGrid": mj.to_textgrid(segments, 4000.5),
        }.items():
            assert page.awaited(write, form, given, 4000.5) == wanted
        assert json.loads(page.awaited(write, "json", given, 1)) == given

    linked = "{ return (await import('/times.js')).pieces(given[0], 60) }"
    text = "At 3.2 s and [1.20], 00:03 and 0:05.5; 4.00 - 5.5: a bell. 0.73, 5 people, [99.0], 7秒"
    found = page.awaited(linked, text)
    assert "".join(piece["text"] for piece in found) == text
    times = [(piece["text"], piece["time"]) for piece in found if "time" in piece]
    assert times == [
        ("3.2 s", 3.2),
        ("[1.20]", 1.2),
        ("00:03", 3),
        ("0:05.5", 5.5),
        ("4.00", 4),
        ("5.5", 5.5),
        ("7秒", 7),
    ]


def test_a_file_is_saved(opened, tmp_path, model):
    page = opened
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    page.drop(CLIP)
    page.transcribe()
    page.run("document.getElementById('lane').value = 'words'")
    page.click("[data-form=srt]")
    saved = tmp_path / "two_people.srt"
    page.until(saved.exists)
    words = mj.transcribe(model, CLIP, "word").segments
    assert saved.read_text() == mj.to_srt(words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_accessibility(opened, scheme):
    """axe-core's rules on the full page, contrast included."""
    axe = pytest.importorskip("axe_core_python")
    page = opened
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.drop(CLIP)
    page.transcribe()
    page.ask(EVENTS)
    page.run("document.getElementById('key-form').hidden = false")
    page.run((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.awaited("{ return await axe.run() }")
    assert "color-contrast" in {each["id"] for each in found["passes"]}  # it could be computed
    assert [each["id"] for each in found["incomplete"] if not each["nodes"]] == []
    grave = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in grave] == []


def test_no_sideways_scrolling_on_a_phone(opened):
    page = opened
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.drop(CLIP)
        page.transcribe()
        page.ask(EVENTS)
        wide = page.run("return document.documentElement.scrollWidth")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide == 390


# --- with an engine that says what the test wants ------------------------------------------------


@pytest.fixture
def script(page, model):
    """(page, engine, server); the server has a key."""
    service = Scripted()
    with listening(State(model, service, ["small"]), KEY) as server:
        page.open(server.url)
        yield page, service, server


def begin(page, service, question: str) -> int:
    """Asks; gives the engine's number of the prompt."""
    page.one("#question").send_keys(question)
    page.click("#ask")
    page.until(lambda: service.prompts)
    return next(iter(service.prompts))


def test_key_stream_thinking_and_stop(script, model):
    page, service, server = script
    page.until(lambda: page.one("#key-form").is_displayed())
    assert page.text("#error") == "The server needs an API key."
    page.one("#key").send_keys("wrong\n")
    page.until(lambda: page.text("#error") == "The server does not know this API key.")
    page.one("#key").send_keys(f"{KEY}\n")
    page.until(lambda: page.text("#model") == "small")
    assert not page.one("#key-form").is_displayed()
    assert page.run("return [localStorage.length, document.cookie, location.href]") == [
        0,
        "",
        f"{server.url}/",
    ]
    page.drop(CLIP)

    number = begin(page, service, "How many?")
    ids = list(model.tokenizer.encode("<think>I count.</think>Two of them"))
    service.tell(number, ids)
    page.until(lambda: "Two of" in page.text(".turn.model .said"))
    thinking = page.one(".turn.model details")
    assert thinking.get_attribute("open") is None
    assert thinking.get_attribute("textContent") == "ThinkingI count."
    assert page.one("#stop").is_displayed()
    page.click("#stop")
    page.until(lambda: service.cancelled == [number])  # its place is free
    page.until(lambda: "Stopped." in page.text(".turn.model"))
    assert page.one("#ask").is_displayed()

    number = begin(page, service, "And then?")
    ids = list(model.tokenizer.encode("again again"))
    service.tell(number, ids, "loop")
    page.until(lambda: page.all(".warning"))
    assert "repeated itself" in page.text(".turn.model:last-child .warning")
    del service.prompts[number]

    service.dead = RuntimeError("gone")
    page.one("#question").send_keys("Still there?")
    page.click("#ask")
    page.until(lambda: page.one("#error").is_displayed())
    assert page.text("#error") == "the engine answers no more (RuntimeError)"
    assert len(page.all(".turn.model")) == 2  # the question is back where it was written
    assert page.one("#question").get_attribute("value") == "Still there?"
    service.dead = None


def test_a_file_without_sound(script):
    page, _, _ = script
    page.until(lambda: page.one("#key-form").is_displayed())
    page.one("#key").send_keys(f"{KEY}\n")
    page.until(lambda: page.text("#model") == "small")
    page.drop(Path(__file__))
    page.click("#transcribe")
    page.until(lambda: page.one("#error").is_displayed())
    assert page.text("#error").startswith("file")
    assert page.text("#transcribe") == "Transcribe"
