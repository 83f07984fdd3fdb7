"""The files that start a server elsewhere: they parse, and their options and routes exist.

No image is built and no cluster is asked.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moss_audio_jax import cli
from moss_audio_jax.serve import __main__ as verb
from moss_audio_jax.serve.app import OPEN

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "launch" / "moss-audio-jax.service"


@pytest.fixture(scope="module")
def options():
    """The options of `serve`."""
    help = subprocess.run(
        [sys.executable, "-m", "moss_audio_jax.serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"(?<!\S)(--[a-z-]+)", help.stdout))


def given(words):
    """The options among the words of a command line, with their values."""
    words = [part for word in words for part in word.split("=", 1)]
    values = [*words[1:], ""]
    return {a: b for a, b in zip(words, values, strict=True) if a.startswith("--")}


def test_the_image():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    named = dict(steps)
    (install,) = [value for name, value in steps if name == "RUN" and "pip install" in value]
    brackets = re.search(r"\[(serve.*?)\]", install)[1]
    for extra, expected in (("", "serve"), ("cuda", "serve,cuda"), ("tpu", "serve,tpu")):
        shown = subprocess.run(
            ["bash", "-c", f'printf %s "{brackets}"'], env={"EXTRA": extra}, capture_output=True
        )
        assert shown.stdout.decode() == expected
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {"serve", "cuda", "tpu"} <= set(setup["options.extras_require"])
    assert named["ARG"] == "EXTRA="
    assert int(named["USER"]) > 0
    path = re.search(r"127\.0\.0\.1:(\d+)(/\w+)", named["HEALTHCHECK"])
    assert path[2] == "/health"
    assert path[2] in OPEN
    compile(json.loads(named["HEALTHCHECK"].split("CMD", 1)[1])[2], "check", "exec")
    entry, words = json.loads(named["ENTRYPOINT"]), json.loads(named["CMD"])
    assert entry == ["moss-audio-jax"]
    assert words[0] in cli.VERBS
    assert given(words)["--port"] == path[1] == named["EXPOSE"]


def test_what_the_image_leaves_out_is_not_needed():
    """A wheel is built of what .dockerignore leaves."""
    left_out = (ROOT / ".dockerignore").read_text().split()
    for needed in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md"):
        assert (ROOT / needed).exists()
        assert needed not in left_out
    assert not {"configs", "moss_audio_jax"} & set(left_out)


def test_the_image_starts_no_server_without_a_key(options, monkeypatch, capsys):
    from moss_audio_jax import command

    monkeypatch.delenv(verb.KEY, raising=False)
    assert command.run(verb.main, ["--host", "0.0.0.0", "--port", "8000"]) == 2
    assert verb.KEY in (ROOT / "Dockerfile").read_text()
    assert "--api-key-file" in capsys.readouterr().err


def test_the_deployment(options):
    documents = list(yaml.safe_load_all((ROOT / "launch" / "serve_gke.yaml").read_text()))
    deployment, service = documents
    assert [each["kind"] for each in documents] == ["Deployment", "Service"]
    pod = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (container,) = pod["containers"]
    words = container["args"]
    assert words[0] == "serve"
    set_here = given(words)
    assert set(set_here) <= options
    (port,) = container["ports"]
    assert str(port["containerPort"]) == set_here["--port"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness")}
    probes["startup"] = container["startupProbe"]["httpGet"]
    assert {name: each["path"] for name, each in probes.items()} == {
        "liveness": "/health",
        "readiness": "/ready",
        "startup": "/health",
    }
    assert {each["path"] for each in probes.values()} <= set(OPEN)
    assert {each["port"] for each in probes.values()} == {port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(set_here["--drain-seconds"])
    assert pod["terminationGracePeriodSeconds"] > before + drain + 2 * verb._GRACE
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(mounts) == {each["name"] for each in pod["volumes"]}
    assert set_here["--api-key-file"].startswith(f"{mounts['keys']}/")
    assert set_here["--checkpoint"].startswith(f"{mounts['model']}/")
    assert "secret" in next(each for each in pod["volumes"] if each["name"] == "keys")
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert f"XDG_CACHE_HOME={mounts['cache']}\n" in (ROOT / "Dockerfile").read_text()


def test_the_unit(options):
    unit = configparser.ConfigParser(strict=True, interpolation=None, comment_prefixes="#")
    unit.optionxform = str
    unit.read(UNIT)
    service = unit["Service"]
    program, name, *words = shlex.split(service["ExecStart"])
    assert Path(program).is_absolute()
    assert (Path(program).name, name) == ("moss-audio-jax", "serve")
    set_here = given(words)
    assert set(set_here) <= options
    assert verb._is_loopback(set_here["--host"])
    drain = float(set_here["--drain-seconds"])
    assert int(service["TimeoutStopSec"]) > drain + 2 * verb._GRACE
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert service["NoNewPrivileges"] == "yes"
    credential = service["LoadCredential"].partition(":")[0]
    assert set_here["--api-key-file"] == f"${{CREDENTIALS_DIRECTORY}}/{credential}"
    cache = f"/var/cache/{service['CacheDirectory']}"
    assert service["Environment"] == f"XDG_CACHE_HOME={cache}"


def test_systemd_agrees(tmp_path):
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd is not installed")
    unit = tmp_path / UNIT.name  # with a program that exists
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
    checked = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert unit.name not in checked.stderr, checked.stderr
