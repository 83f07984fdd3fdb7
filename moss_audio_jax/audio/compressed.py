"""Decodes everything that is not plain samples with FFmpeg, through PyAV.

The length of a file is that of the sound in its packets. It is compared with what the header
promises; lengths that FFmpeg guesses from a bit rate are not used.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import av
import numpy as np

from moss_audio_jax.audio import pcm, structure
from moss_audio_jax.errors import InputError

_BLOCK = 1 << 16  # samples per channel that are gathered before they are passed on
_READ = 1 << 16  # bytes that FFmpeg asks for at a time
# The formats that FFmpeg may use. Playlists would open other files and addresses.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,ac3,eac3,aiff,amr,ape,asf,au,avi,avr,caf,dsf,dts,"
    "dtshd,flac,flv,iff,ircam,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,ogg,pvf,sds,tta,voc,w64,wav,wv"
)
# Formats whose header states a length. For others FFmpeg guesses it from the bit rate.
_STATED = {"mov,mp4,m4a,3gp,3g2,mj2", "ape", "caf", "mpc", "mpc8", "tta", "wv"}
# Formats without a container, with tags or junk between frames; the largest frame in bytes.
_BARE = {"mp3": 2048, "aac": 8192}
# Codecs whose frames hold a checksum, which FFmpeg reads only if it is told to.
_CHECKED = {"flac", "wavpack", "ac3", "eac3"}
_SYNC = re.compile(rb"\xff[\xe0-\xfe]")  # how their frames start
_SLACK = 0.1  # seconds: a header may count the decoder's delay, and may round
_PLANES = (
    8  # from this many channels on, PyAV reads beyond a frame's planes; they are interleaved first
)
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICS", b"3DI")
_OGG_HEADERS = {"vorbis": 3, "opus": 2}  # packets


def blocks(
    file: BinaryIO, allow: Callable[[float], None], note: Callable[[str], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes a file: (rate, float32 [n, channels]), integers scaled to -1..1.

    Args:
      allow: called with the seconds that a header promises; raises if they are too many.
      note: called with messages for the user: what was chosen, what was left out.

    Raises:
      InputError: the file is not audio, or cut short or damaged.
    """
    links = structure.links(file)
    for link in links:
        part = file
        if len(links) > 1:
            # FFmpeg reads it from memory, because a Python file object could swallow Ctrl-C.
            part = io.BytesIO(structure.read_at(file, link.start, link.stop - link.start))
        part.seek(0)
        try:
            container = av.open(
                part,
                format=link.format,
                options={"format_whitelist": _FORMATS},
                metadata_errors="replace",
                buffer_size=_READ,
            )
        except av.FFmpegError as error:
            # FFmpeg's message for a format that is not on the list would not help.
            unknown = isinstance(error, av.ArgumentError)
            reason = "a format that is not supported" if unknown else error.strerror or error
            raise InputError(
                structure.cut(part) or f"is not audio that can be decoded (FFmpeg: {reason})"
            ) from None
        with container:
            yield from _Track(container, part, link, allow, note).blocks()


class _Track:
    """The sound of one file."""

    def __init__(self, container, file: BinaryIO, link: structure.Link, allow: Callable, note):
        self._container, self._file, self._link = container, file, link
        self._allow, self._note = allow, note
        self._stream = _chosen(container, note)
        self._codec = codec = self._stream.codec_context
        if codec is None:
            raise InputError("holds sound in a coding that FFmpeg does not know")
        codec.thread_count = 1
        self._format = container.format.name
        self._packets = 0
        self._failure = None  # what ended the decoding early
        self._last = None  # the last packet with sound
        self._frame_count, self._padding = None, 0  # by the header of an MP3
        self._begin = self._end = None  # by the frames of a FLAC
        self._left_out = self._lost = 0  # bytes outside frames; damaged frames
        self._skip, self._length = 0, None  # samples to drop at the start; to keep after that
        self._promised = self._promised_seconds()
        allow(self._promised or 0)

        self._watch = {"mp3": self._watch_mpeg, "flac": self._watch_flac}.get(self._format)
        if codec.name in _CHECKED:
            codec.options = {"err_detect": "crccheck+explode"}
        elif codec.name in _OGG_HEADERS and link.last_granule is not None:
            # FFmpeg trims up to a block too much of Vorbis, so the pages decide what to keep.
            codec.options = {"flags2": "+skip_manual"}
            self._watch, self._decoded, self._counted = self._watch_granules, 0, 0
            if codec.name == "opus":  # pages count the samples that are dropped at the start
                self._skip = int.from_bytes((codec.extradata or b"")[10:12], "little")
                self._counted = self._skip
        if not link.ended:
            note("its last Ogg page is not marked as the end: it may have been cut short")

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        seconds, given = 0.0, 0
        for rate, block in _gathered(self._frames()):
            if self._skip:
                self._skip, block = max(0, self._skip - len(block)), block[self._skip :]
            if self._padding:
                # Writers disagree by one on whether the count includes its own frame.
                self._length = self._mpeg_samples(max(self._frame_count, self._packets))
            if self._length is not None:
                block = block[: max(0, self._length - given)]
            given += len(block)
            seconds += len(block) / rate
            yield rate, block
        self._check(given, seconds)

    def _frames(self) -> Iterator[av.AudioFrame]:
        decode = self._codec.decode
        try:
            for packet in self._demuxed():
                try:
                    frames = decode(packet)
                except av.InvalidDataError:
                    if self._format not in _BARE:
                        raise
                    frames = None
                if packet.size:
                    if not frames and self._format in _BARE:
                        frames = self._behind_junk(bytes(packet), frames is None)
                    else:
                        self._packets += 1
                        self._last = packet
                    if self._watch:
                        self._watch(packet, frames)
                yield from frames
        except av.FFmpegError as error:
            self._failure = error  # the caller first gets what came before

    def _demuxed(self) -> Iterator[av.Packet]:
        # PyAV may raise IndexError after the last packet if another stream began within the file.
        with contextlib.suppress(IndexError):
            yield from self._container.demux(self._stream)

    # --- bookkeeping by format -------------------------------------------------------------------

    def _promised_seconds(self) -> float | None:
        """The length that the header states."""
        stream, container = self._stream, self._container
        if self._link.samples and self._codec.sample_rate:
            return self._link.samples / self._codec.sample_rate
        if self._format in _STATED and stream.duration:
            return float(stream.duration * stream.time_base)
        if len(container.streams) > 1:  # Matroska and ASF state the longest stream's length only
            return None
        if "webm" in self._format and container.duration:
            return container.duration / 1e6
        # FFmpeg would guess it if the file has not the size that its header states.
        return self._asked(structure.asf_seconds) if self._format == "asf" else None

    def _asked(self, look: Callable, *more: Any) -> Any:
        """What `look` finds in the file, which FFmpeg then reads on where it was."""
        pos = self._file.tell()
        found = look(self._file, *more)
        self._file.seek(pos)
        return found

    def _watch_mpeg(self, packet: av.Packet, frames: list) -> None:
        """Reads the frame count from the header, which lies before the first packet."""
        promise = self._asked(structure.mpeg_promise, packet.pos or 0)
        self._watch = None
        if promise and self._codec.sample_rate:
            self._frame_count, self._padding = promise
            self._promised = self._mpeg_samples(self._frame_count) / self._codec.sample_rate
            self._allow(self._promised)

    def _mpeg_samples(self, count: int) -> int:
        return count * self._codec.frame_size - self._padding

    def _watch_flac(self, packet: av.Packet, frames: list) -> None:
        for frame in frames:
            if frame.pts is not None:
                self._begin = frame.pts if self._begin is None else self._begin
                self._end = frame.pts + frame.samples

    def _watch_granules(self, packet: av.Packet, frames: list) -> None:
        link, name = self._link, self._codec.name
        samples = sum(frame.samples for frame in frames)
        if name == "vorbis" and self._packets == 1:
            self._skip, samples = samples, 0  # half a block: pages do not count it
        self._decoded += samples
        if self._packets == link.first_packets - _OGG_HEADERS[name]:
            # A recording of a broadcast does not begin at 0.
            only_page = link.first_granule == link.last_granule
            begin = 0 if only_page else max(0, link.first_granule - self._decoded)
            self._length = link.last_granule - begin - self._counted

    def _behind_junk(self, data: bytes, failed: bool) -> list:
        """The sound in a packet of a bare stream that decoded to nothing.

        FFmpeg joins a tag or junk with the frame after it into one packet.
        """
        frames = []
        if _SYNC.match(data):  # a damaged frame, or one that holds only the encoder's delay
            self._lost += failed
            self._packets += not failed
            self._last = data
            return frames
        for match in _SYNC.finditer(data, max(0, len(data) - _BARE[self._format])):
            frame = data[match.start() :]
            if self._whole_frame(frame) == len(frame):
                with contextlib.suppress(av.InvalidDataError):
                    frames = self._codec.decode(av.Packet(frame))
            if frames:
                self._packets += 1
                self._last, data = frame, data[: match.start()]
                break
        if not data.startswith(_TAGS) and data.strip(b"\0"):
            self._left_out += len(data)
        return frames

    def _whole_frame(self, data: bytes) -> int:
        """The size in bytes that the header of a frame states; 0 if `data` starts with no frame."""
        parser = av.CodecContext.create(self._codec.name, "r")
        whole = parser.parse(data[:16] + bytes(_BARE[self._format]))
        return whole[0].size if whole else 0

    def _check(self, given: int, seconds: float) -> None:
        """Raises InputError if the end or something in the middle is missing."""
        promised, slack = self._promised, _SLACK
        short = False
        if self._format == "flac":
            slack = 1e-6  # less than a sample: seconds are sums
            short = self._begin is not None and given < self._end - self._begin
        elif self._format in _BARE and self._last is not None:
            slack = self._codec.frame_size / (self._codec.sample_rate or 1)
            last = bytes(self._last)
            short = len(last) < self._whole_frame(last)
            if self._frame_count and self._packets > self._frame_count + 1:
                raise InputError(
                    f"holds {self._packets} MPEG frames but its header promises "
                    f"{self._frame_count} ({promised:.2f} s), at which players stop (files joined "
                    "end to end?)"
                )
        if promised and (self._failure or short or seconds < promised - slack):
            raise InputError(
                f"is cut short or damaged: {seconds:.2f} s could be decoded of the "
                f"{promised:.2f} s that its header promises"
            )
        if short and self._format == "flac":
            raise InputError("is damaged: samples are missing within it")
        if short:
            raise InputError(
                f"is cut short: it ends in the middle of an MPEG frame, after {seconds:.2f} s"
            )
        whole = "mp4" in self._format and self._packets >= self._stream.frames > 0
        if not whole and (complaint := structure.cut(self._file)):
            raise InputError(complaint)
        if self._failure:
            reason = self._failure.strerror or self._failure
            raise InputError(f"is damaged after {seconds:.2f} s ({reason})")
        if self._lost or self._left_out:
            damaged = self._lost > self._packets or self._left_out > self._file.seek(0, 2) / 2
            if damaged or not given:
                raise InputError("is not audio that can be decoded: most of it is not MPEG frames")
            self._note(
                f"{self._lost} damaged frames and {self._left_out} bytes outside frames were "
                "left out"
            )


def _chosen(container, note: Callable[[str], None]):
    """The track that players play: the one marked as default, otherwise the first."""
    tracks = container.streams.audio
    if not tracks:
        raise InputError("holds no audio stream")
    marked = [number for number, track in enumerate(tracks) if track.disposition & 1]
    number = marked[0] if marked else 0
    if len(tracks) > 1:
        why = "marked as the default" if marked else "the first"
        note(f"holds {len(tracks)} audio tracks; track {number + 1}, {why}, is used")
    return tracks[number]


def _gathered(frames: Iterator[av.AudioFrame]) -> Iterator[tuple[int, np.ndarray]]:
    """Joins frames into larger blocks. Rate and channels may change between frames."""
    fifo, kind, interleave = av.AudioFifo(), None, None
    for frame in frames:
        now = (frame.sample_rate, frame.layout.nb_channels)
        if now != kind:  # the FIFO itself would not notice other channels
            if fifo.samples:
                yield _samples(fifo.read())
            fifo, kind, interleave = av.AudioFifo(), now, None
            if frame.format.is_planar and now[1] >= _PLANES:
                interleave = av.AudioResampler(format=frame.format.packed.name)
        frame.pts = None  # gaps between the times of frames must not become silence
        for part in interleave.resample(frame) if interleave else (frame,):
            part.pts = None
            fifo.write(part)
        if fifo.samples >= _BLOCK:
            yield _samples(fifo.read())
    if fifo.samples:
        yield _samples(fifo.read())


def _samples(frame: av.AudioFrame) -> tuple[int, np.ndarray]:
    """(rate, float32 [n, channels]), integers scaled to -1..1."""
    data = frame.to_ndarray()  # [channels, n], or [1, n * channels] where interleaved
    if frame.format.is_planar:
        data = data.T
    else:
        data = data.reshape(-1, frame.layout.nb_channels)
    return frame.sample_rate, pcm.scaled(data)
