"""WAV files of every kind, and what there is to hear in an MP3 made of one."""

import math
import random
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Callable
from typing import NamedTuple

from imageio_ffmpeg import get_ffmpeg_exe

UNKNOWN = 0xFFFFFFFF  # as a size

# Format tag, bits, and how a sample from -1 to 1 is written.
PCM: dict[str, tuple[int, int, Callable[[float], bytes]]] = {
    "u8": (1, 8, lambda sample: struct.pack("B", 128 + round(127 * sample))),
    "s16": (1, 16, lambda sample: struct.pack("<h", round(0x7FFF * sample))),
    "s24": (1, 24, lambda sample: struct.pack("<i", round(0x7FFFFF * sample))[:3]),
    "s32": (1, 32, lambda sample: struct.pack("<i", round(0x7FFFFFFF * sample))),
    "f32": (3, 32, lambda sample: struct.pack("<f", sample)),
    "f64": (3, 64, lambda sample: struct.pack("<d", sample)),
}


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def info(**tags: str) -> bytes:
    """A chunk of INFO tags: INAM is the title, IART the artist."""
    texts = [chunk(name.encode(), text.encode() + b"\0") for name, text in tags.items()]
    return chunk(b"LIST", b"INFO" + b"".join(texts))


def pcm_format(tag: int, bits: int, rate: int, channels: int, *, extensible: bool = False) -> bytes:
    align = channels * bits // 8
    layout = struct.pack("<HIIHH", channels, rate, rate * align, align, bits)
    if not extensible:
        return struct.pack("<H", tag) + layout
    speakers = {1: 0x4, 2: 0x3, 6: 0x3F}[channels]
    extension = struct.pack("<HHIH", 22, bits, speakers, tag)
    return b"\xfe\xff" + layout + extension + bytes.fromhex("000000001000800000aa00389b71")


def riff(
    fmt: bytes,
    data: bytes,
    *,
    form: bytes = b"RIFF",
    declared: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A file with other chunks before and after data, whose size is declared as given."""
    size = len(data) if declared is None else declared
    head = before + chunk(b"fmt ", fmt)
    tail = b"\0" * (len(data) % 2) + after
    total = 4 + len(head) + 8 + len(data) + len(tail)
    if form != b"RIFF":
        head = chunk(b"ds64", struct.pack("<QQQI", total + 36, size, 0, 0)) + head
        size = total = UNKNOWN
    elif declared in (0, UNKNOWN):
        total = declared
    start = form + struct.pack("<I", total) + b"WAVE" + head
    return start + b"data" + struct.pack("<I", size) + data + tail


def sine(samples: int, rate: int) -> list[float]:
    return [math.sin(2 * math.pi * 440 * n / rate) / 2 for n in range(samples)]


def wav(
    samples: int = 11025,
    *,
    rate: int = 44100,
    channels: int = 1,
    encoding: str = "s16",
    extensible: bool = False,
    form: bytes = b"RIFF",
    declared: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """The same sine in every channel."""
    tag, bits, pack = PCM[encoding]
    fmt = pcm_format(tag, bits, rate, channels, extensible=extensible)
    data = b"".join(pack(sample) * channels for sample in sine(samples, rate))
    return riff(fmt, data, form=form, declared=declared, before=before, after=after)


def noise(size: int) -> bytes:
    """16-bit stereo with size bytes of data: hard work for an encoder."""
    return riff(pcm_format(1, 16, 44100, 2), random.Random(size).randbytes(size))


SPEECH = wav()
LONG = noise(10_000_000)  # a minute


def gsm(blocks: int) -> bytes:
    """GSM 6.10: noise, of which each block of 65 bytes holds 320 samples."""
    fmt = struct.pack("<HHIIHHHH", 0x31, 1, 8000, 1625, 65, 0, 2, 320)
    return riff(fmt, random.Random(blocks).randbytes(65 * blocks))


def ffmpeg(*arguments: str, stdin: bytes) -> bytes:
    """What ffmpeg makes of stdin, both being files: it has to seek for sizes in headers.

    It is told what stdin is: of three frames of MP3 it would not believe that they are any.
    """
    kind = "wav" if stdin.startswith((b"RIFF", b"RF64")) else "mp3"
    command = [get_ffmpeg_exe(), "-v", "error", "-f", kind, "-i", "/dev/stdin"]
    command += [*arguments, "-y", "/dev/stdout"]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
        source.write(stdin)
        source.seek(0)
        subprocess.run(command, stdin=source, stdout=output, check=True)
        output.seek(0)
        return output.read()


def recoded(content: bytes, codec: str) -> bytes:
    """The same sound as a WAV in another of ffmpeg's codecs."""
    return ffmpeg("-c:a", codec, "-f", "wav", stdin=content)


class Sound(NamedTuple):
    rate: int
    channels: int
    samples: "array[int]"  # of the first channel, 16 bits each

    def resembles_the_sine(self) -> bool:
        """Leaving out both ends, where an encoder has nothing on one side to go by."""
        edge = len(self.samples) // 4
        pairs = list(zip(self.samples, sine(len(self.samples), self.rate), strict=True))[edge:-edge]
        error = sum((heard - 0x7FFF * sample) ** 2 for heard, sample in pairs)
        return error < 0.001 * sum(heard**2 for heard, _ in pairs)


def decoded(content: bytes) -> Sound:
    """What a player makes of content, an MP3 or a WAV."""
    plain = ffmpeg("-c:a", "pcm_s16le", "-bitexact", "-f", "wav", stdin=content)
    channels, rate = struct.unpack_from("<HI", plain, 22)
    samples = array("h", plain[plain.index(b"data") + 8 :])
    return Sound(rate, channels, samples[::channels])


def tags(mp3: bytes) -> dict[str, str]:
    lines = ffmpeg("-fflags", "+bitexact", "-f", "ffmetadata", stdin=mp3).decode().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
