"""Who may import whom: a room imports from rooms above it, and the core from the core alone.

Imports within functions count, those under TYPE_CHECKING do not. Names that are looked up as text
when they are asked for (`cli.VERBS`, the lists of lazy names in `__init__` files) are not seen.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moss_audio_jax"
CORE = [
    "__init__",
    "devices",
    "libtpu",
    "errors",
    "tree",
    "bucket_clients",
    "buckets",
    "lease",
    "files",
    "journal",
    "remote",
    "hub",
    "runtime",
    "config",
    "config_file",
    "sharding",
    "audio",
    "text",
    "timeline",
    "ops",
    "models",
    "weights",
    "data",
    "generate",
    "train",
    "api",
    "command",
    "cli",
    "generate.__main__",
    "train.__main__",
    "transcribe",
    "convert",
]
PERIPHERY = [
    "draw",
    "serve",
    "world",
    "evaluate",
    "post_train",
    "annotate",
    "plan",
    "demo",
]
ROOMS = [*CORE, *PERIPHERY]


def room_of(name: str) -> str:
    """The room of a module, or of a name in it: "text" of moss_audio_jax.text.tasks.EVENTS."""
    parts = name.split(".")[1:]
    found = [room for n in (2, 1) if (room := ".".join(parts[:n])) in ROOMS]
    return found[0] if found else "__init__"  # such as moss_audio_jax.__version__


def imports(node: ast.AST):
    """(line, module or module.name) of every import under `node` that runs."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports here are absolute"
        yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def test_a_room_imports_from_rooms_above_it():
    wrong, seen = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert here != "__init__" or path == PACKAGE / "__init__.py", f"{path} is in no room"
        seen.add(here)
        for line, name in imports(ast.parse(path.read_text())):
            if name.partition(".")[0] == "moss_audio_jax":
                there = room_of(name)
                if ROOMS.index(there) > ROOMS.index(here):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)
    assert seen == set(ROOMS)


def test_the_table_is_the_one_of_the_docs():
    block = (ROOT / "docs" / "design.md").read_text().split("```")[1]
    listed = []
    for entry in re.findall(r"^  (\S+(?: \S+)*)", block, re.MULTILINE):
        names = [re.sub(r"(\.py|/)$", "", name) for name in entry.split()]
        listed += [re.sub("-+", "the line", name.replace("/", ".")) for name in names]
    assert listed == [*CORE, "the line", *PERIPHERY]
