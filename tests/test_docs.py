"""The commands in README, guides and helps: each parses, and the files that it names exist.

Their output is not tested here; the verbs' own tests do that.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

import moss_audio_jax as mj
from moss_audio_jax import cli, command, config_file
from moss_audio_jax.train.__main__ import load_config

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
# The start of one of our commands: after a prompt, variables, or another command.
_OURS = re.compile(
    r"(?:\.venv/bin/)?(moss-audio-jax|launch/\w"
    r"|python3? (?:-m moss_audio_jax|(?:tools|launch|examples)/))"
)


def code_of(page: str) -> list[str]:
    """Code blocks, fenced or indented, and code within sentences; one command a line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (.*)$", rest, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", rest)
    blocks = [*fenced, "\n".join(indented), *(" ".join(span.split()) for span in inline)]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(page: str) -> list[list[str]]:
    """Words of every command of ours on a page; a verb's name alone and sketches with "..." are
    none."""
    found = []
    for line in code_of(page):
        for part in line.split("&&"):
            if (ours := _OURS.search(part)) and "..." not in part and "|" not in part:
                words = shlex.split(part[ours.start(1) :], comments=True)
                if "VERB" not in words and (
                    words[-1] == "demo" or any(word.startswith("--") for word in words)
                ):
                    found.append(words)
    return found


class Parsed(Exception):
    """A verb had its options; it need not run."""


@pytest.fixture
def parse(monkeypatch):
    """parse(words): a verb's own parser reads them; UsageError where it cannot."""

    real = command._Parser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        raise Parsed(real(self, *args, **kwargs))

    monkeypatch.setattr(command._Parser, "parse_known_args", parse_and_stop)

    def parse(words):
        module = __import__(cli.VERBS[words[0]][0], fromlist=["main"])
        with pytest.raises(Parsed) as parsed:
            module.main(words[1:])
        args, rest = parsed.value.args[0]
        if words[0] in ("train", "plan"):
            load_config(args.config, rest)
        else:
            assert not [word for word in rest if not word.startswith("--config.")]

    return parse


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_parse(page, parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a reader's folder: packaged configs are found without the clone
    for words in commands(page):
        if words[0] == "moss-audio-jax":
            parse(words[1:])
        elif words[1] == "-m":
            verb = words[2].removeprefix("moss_audio_jax").strip(".")
            assert verb in cli.VERBS, words
            parse([verb, *words[3:]])
        else:
            script = ROOT / (words[0] if words[0].startswith("launch/") else words[1])
            source = script.read_text(encoding="utf-8")  # it is there
            end = words.index("--") if "--" in words else len(words)
            options = {word.split("=")[0] for word in words[:end] if re.match("--[a-z]", word)}
            unknown = [o for o in options if o not in source and not o.startswith("--config")]
            assert not unknown, (words, unknown)
            if words[end + 1 : end + 2] == ["moss-audio-jax"]:  # what the script starts
                parse(words[end + 2 :])


def test_commands_are_found_at_all():
    readme = commands("README.md")
    assert {words[1] for words in readme} >= set(cli.VERBS) - {"plan"}
    assert sum(len(commands(page)) for page in PAGES) > 25


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_of_a_help_parse(verb, parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    doc = __import__(cli.VERBS[verb][0], fromlist=["main"]).__doc__.replace("\\\n", " ")
    lines = [line.strip() for line in doc.splitlines() if line.startswith("  moss-audio-jax ")]
    assert lines or verb == "evaluate"  # its parts have their own examples
    for line in lines:
        parse(shlex.split(line)[1:])


def test_python_of_the_readme_compiles_and_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "mj":
                assert hasattr(mj, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_configs_that_pages_name_are_there():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"configs/([\w/]+\.py)", text):
            assert (config_file.FOLDER / name).is_file(), (page, name)
