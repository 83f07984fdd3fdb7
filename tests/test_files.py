"""Foreign files are read safely; files are written whole or not at all; a folder has one owner."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from moss_audio_jax import files
from moss_audio_jax.errors import InputError, UsageError


def test_only_regular_files_are_opened(tmp_path):
    """They are refused at once, because a FIFO or a device would block or never end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "good").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "caf\udce9").write_bytes(b"d")
    cases = {
        tmp_path / "fifo": "fifo: is not a regular file; expected a song",
        "/dev/zero": "not a regular file",
        "/proc/self/status": "not a regular file",
        tmp_path: "is a directory; expected a song",
        tmp_path / "none": "none: no such file",
        tmp_path / "a\nb": r"a\\nb: no such file",
        "a\0b": r"a\\x00b: cannot be opened",
        "\ud800": r"\\ud800: cannot be opened",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            files.open_regular(path, "a song")
        assert "\n" not in str(raised.value)
        str(raised.value).encode()
    for name, held in {"good": b"abc", "link": b"abc", "caf\udce9": b"d"}.items():
        assert files.read_bytes(tmp_path / name) == held


def test_json_of_strangers():
    assert files.parse_json(b'\xef\xbb\xbf{"a": [1]}', "x") == {"a": [1]}
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{", "", b"\xff{}", "[1,]"):
        with pytest.raises(InputError, match=r"^row 7: ") as raised:
            files.parse_json(text, "row 7")
        assert len(str(raised.value)) < 300
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("letter", ["n", "ü", "\udcff"])
def test_a_name_may_have_as_many_bytes_as_the_disk_allows(letter, tmp_path):
    name = letter * (251 // len(os.fsencode(letter))) + ".txt"
    files.write_whole(tmp_path / name, "all")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "all"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    files.write_whole(target, "old\ud800\n")
    assert target.read_text() == "old\\ud800\n"
    with contextlib.suppress(ZeroDivisionError), files.writing(target) as file:
        file.write("new")
        raise ZeroDivisionError
    assert target.read_text() == "old\\ud800\n"
    with files.writing(target, "wb") as file:
        file.write(b"new")
        assert target.read_text() == "old\\ud800\n"
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file.txt"]
    for bad in (target / "below", tmp_path):
        with pytest.raises(InputError, match="not written: "):
            files.write_whole(bad, "x")


def test_links_devices_and_pipes_stay_what_they_are(tmp_path):
    """They were replaced by files of their names, /dev/full by a root who tried it."""
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to("real")
    (tmp_path / "ahead").symlink_to("made")
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    for path in (link, tmp_path / "ahead", pipe):
        files.write_whole(path, "new")
    reader.join(10)
    files.write_whole("/dev/null", "new")
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert not os.path.isfile("/dev/null")
    assert (real.read_text(), (tmp_path / "made").read_text(), read) == ("new", "new", ["new"])
    with pytest.raises(InputError, match="/dev/full: not written: "):
        files.write_whole("/dev/full", "new")


def test_a_full_disk_says_so(tmp_path):
    """/dev/full is one: the system refuses every byte."""
    log = tmp_path / "log.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"log.jsonl: not written: the disk is full \(.* MB free"):
        files.append(log, "a line\n")
    hidden = ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")
    for error in (OSError(errno.ENOSPC, ""), OSError(errno.EDQUOT, ""), hidden):
        told = str(files.not_written(tmp_path / "a" / "b", error, need=1_500_000))
        assert f"MB free in {tmp_path}, up to 1.5 MB needed)" in told
    told = str(files.not_written(tmp_path / "a", OSError(errno.EROFS, "Read-only file system")))
    assert told.endswith("a: not written: Read-only file system")


def test_checksums_find_every_damage(tmp_path):
    names = {"a": b"x" * 5_000_000, "b/c": b"", "b/d": bytes(range(256)), "caf\udce9": b"1"}
    for name, held in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(held)
    sums = files.checksums(tmp_path)
    assert {name: size for name, (size, _) in sums.items()} == {
        name: len(held) for name, held in names.items()
    }
    # Each file belongs to one process, also if processes see different files.
    shares = [files.checksums(tmp_path, (k, 3)) for k in range(3)]
    assert sum(map(len, shares)) == len(sums)
    assert shares[0] | shares[1] | shares[2] == sums
    assert json.loads(json.dumps(sums)) == sums
    assert files.damage(tmp_path, sums) is None
    for name, held in names.items():
        file = tmp_path / name
        harms = {"bytes of": held + b"0", "is missing": None}
        if held:
            harms |= {"checksum": held[:-1] + bytes([held[-1] ^ 1]), f"0 bytes of {len(held)}": b""}
        for message, harm in harms.items():
            file.unlink()
            if harm is not None:
                file.write_bytes(harm)
            assert message in files.damage(tmp_path, sums)
            found = [files.damage(tmp_path, sums, (k, 3)) for k in range(3)]
            assert sum(each is not None for each in found) == 1
            file.write_bytes(held)
        assert files.damage(tmp_path, sums) is None
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "b", "/dev/zero", "a/b", "a\0", "\ud800"):
        fault = files.damage(tmp_path, {name: [1, 1]})
        assert fault.endswith(("is missing", "is not a readable file"))


_HOLD = """
import sys
from moss_audio_jax.files import Lock
with Lock(sys.argv[1], "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_owns_a_folder_until_it_ends(tmp_path):
    folder = tmp_path / "work"
    owner = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=rf"work: in use by train \(process {owner.pid} on "):
        files.Lock(folder, "world").__enter__()
    owner.kill()  # as in a crash, without cleanup
    owner.wait()
    assert str(owner.pid) in (folder / ".lock").read_text()
    with files.Lock(folder, "world"):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    with files.Lock(folder, "world"):
        pass
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(InputError, match="is not a folder"):
            files.Lock(bad, "train").__enter__()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked here \(Function not implemented\)"),
        files.Lock(tmp_path, "train"),
    ):
        pass


def test_words_are_one_short_line():
    assert files.shown("a\nb\x1b\ud800é") == "a\\nb\\x1b\\ud800é"
    assert files.brief("two  words \n") == "two words \\n"
    short = files.brief("x\n  y " * 100, 20)
    assert len(short) <= 20
    assert short.startswith("x\\n y x")
    assert short.endswith(" ...")
    assert len(files.brief("x" * 1000)) == 200
    assert files.reason(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
