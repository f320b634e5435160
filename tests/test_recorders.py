"""What programs record, and what of it an MP3 has to keep."""

import cmath
import io
import math
import shutil
import struct
import subprocess
from array import array
from pathlib import Path
from typing import Any

import mutagen.id3
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from support import UPLOAD, Server, StartServer, User, curl_form, problem, script
from wav import PCM, UNKNOWN, chunk, decoded, ffmpeg, info, pcm_format, riff, sine, wav

# Live, into a pipe: none of them knows a size when it writes its header


FFMPEG = get_ffmpeg_exe()
RECORDERS = {
    # package, program and command
    "arecord": ("alsa-utils", "arecord -q -D null -f S16_LE -r 16000 -t wav - | head -c 96044"),
    "sox, 16 bits": ("sox", "sox -V1 -n -b 16 -t wav - synth 0.5 sine 440"),
    "sox, 24 bits": ("sox", "sox -V1 -n -b 24 -c 2 -t wav - synth 0.5 sine 440"),
    "sox, 32 bits": ("sox", "sox -V1 -n -b 32 -r 48000 -t wav - synth 0.5 sine 440"),
    "sox, mu-law": ("sox", "sox -V1 -n -e mu-law -r 8000 -t wav - synth 0.5 sine 440"),
    "gst-launch-1.0": (
        "gstreamer1.0-tools gstreamer1.0-plugins-good",
        "gst-launch-1.0 -q audiotestsrc num-buffers=20 ! audio/x-raw,rate=44100 ! wavenc"
        " ! fdsink 2>&-",
    ),
    "ffmpeg": ("", f"{FFMPEG} -v error -f lavfi -i sine=duration=0.5 -f wav pipe:1"),
    "ffmpeg, float": (
        "",
        f"{FFMPEG} -v error -f lavfi -i sine=duration=0.5 -c:a pcm_f32le -f wav pipe:1",
    ),
    "lame": ("lame", "lame --quiet --decode tone.mp3 -"),
    "espeak-ng": ("espeak-ng", "espeak-ng --stdout 'Nobody knows how long this is'"),
}


@pytest.mark.parametrize("name", RECORDERS)
def test_recording_is_converted_while_it_is_made(
    server: Server, user: User, tmp_path: Path, name: str
) -> None:
    packages, command = RECORDERS[name]
    if not shutil.which(command.split()[0]):
        pytest.skip(f"{name.split(',')[0]} is not installed: apt-get install {packages}")
    if name == "lame":
        (tmp_path / "tone.mp3").write_bytes(server.convert(wav(22050)))
    upload = ["curl", "--disable", "--silent", "--noproxy", "*", "--max-time", "60", "--include"]
    upload += [*curl_form(user, "@-;filename=live.wav"), server.url + UPLOAD]
    pipe = f'{command} | tee made.wav | exec "$@"'
    done = subprocess.run(["sh", "-c", pipe, "sh", *upload], cwd=tmp_path, capture_output=True)
    assert b" 201 Created" in done.stdout, done.stdout + done.stderr
    made = (tmp_path / "made.wav").read_bytes()
    start = made.index(b"data") + 8
    (declared,) = struct.unpack_from("<I", made, start - 4)
    assert declared != len(made) - start
    (block,) = struct.unpack_from("<H", made, made.index(b"fmt ") + 20)
    listing = server.http.get("/api/records", params={"id_user": user.id}, headers=user.bearer)
    (record,) = listing.json()["records"]
    sound = decoded(server.http.get(record["URL for download"]).content)
    assert len(sound.samples) == (len(made) - start) // block
    assert any(sound.samples)


# Sizes


SIZES = [0x80000000, 0x7FFFF000, 0x7FFFEFFF, 0x7FFFEFFC, 0x7FFFEFF9, 0x7FFF0000, 0x7FFFFFFF]
SIZES += [0, UNKNOWN, 0xFFFFFF9B, 0xFFFFFFD4]


@pytest.mark.parametrize("size", SIZES, ids=hex)
def test_size_that_stands_for_none_means_the_end_of_the_file(server: Server, size: int) -> None:
    content = bytearray(wav(5555))
    content[4:8] = struct.pack("<I", (size + 36) % 2**32)
    content[40:44] = struct.pack("<I", size)
    assert len(decoded(server.convert(bytes(content))).samples) == 5555


def test_empty_audio_before_other_chunks_is_no_audio(server: Server, user: User) -> None:
    content = riff(pcm_format(1, 16, 44100, 1), b"", after=chunk(b"junk", bytes(50_000)))
    assert "holds no audio" in problem(server.upload(user, content), 422)


@pytest.mark.parametrize("whole", [0, 36, UNKNOWN])
def test_audio_of_size_0_in_a_file_of_no_size_runs_to_the_end(server: Server, whole: int) -> None:
    content = wav(5555, declared=0)
    content = content[:4] + struct.pack("<I", whole) + content[8:]
    assert len(decoded(server.convert(content)).samples) == 5555


# Samples in containers


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "container, valid",
    [("s32", 20), ("s32", 24), ("s32", 0), ("s24", 16), ("s24", 20), ("s16", 12), ("s16", 0)],
)
def test_fewer_valid_bits_than_the_container_are_converted_exactly(
    server: Server, container: str, valid: int, channels: int
) -> None:
    tag, bits, pack = PCM[container]
    fmt = bytearray(pcm_format(tag, bits, 44100, channels, extensible=True))
    fmt[18:20] = struct.pack("<H", valid)
    steps = 1 << (valid or bits) - 1  # so that the other bits are 0, as they have to be
    data = b"".join(
        pack(math.floor(sample * steps) / steps) * channels for sample in sine(5555, 44100)
    )
    sound = decoded(server.convert(riff(bytes(fmt), data)))
    assert (sound.channels, len(sound.samples)) == (channels, 5555)
    assert sound.resembles_the_sine()


@pytest.mark.parametrize("value", [1e20, -1e20, math.inf, -math.inf, math.nan, 1e-40])
@pytest.mark.parametrize("encoding", ["f32", "f64"])
def test_float_sample_of_any_value_is_converted(
    server: Server, encoding: str, value: float
) -> None:
    tag, bits, pack = PCM[encoding]
    samples = sine(5555, 44100)
    samples[5000] = value
    content = riff(pcm_format(tag, bits, 44100, 1), b"".join(map(pack, samples)))
    sound = decoded(server.convert(content))
    assert len(sound.samples) == 5555
    head = sound._replace(samples=sound.samples[:4000])
    assert head.resembles_the_sine()


# Clips that are resampled


@pytest.mark.parametrize("samples", [1, 2, 10, 50])
@pytest.mark.parametrize("rate", [1000, 4143, 8001, 22254, 37800, 96000, 192_000, 1_000_000])
def test_resampled_clip_keeps_its_length(server: Server, rate: int, samples: int) -> None:
    loud = struct.pack("<h", 20_000) * samples
    sound = decoded(server.convert(riff(pcm_format(1, 16, rate, 1), loud)))
    assert len(sound.samples) == max(round(samples * sound.rate / rate), 1)
    assert max(map(abs, sound.samples)) > 20 or samples * sound.rate < 10 * rate


@pytest.mark.parametrize("rate", [1000, 4143, 8062, 16001, 22100, 22254])
def test_resampled_recording_is_as_long_as_it_was(server: Server, rate: int) -> None:
    user = server.register()
    link = server.upload(user, wav(2 * rate + 1, rate=rate)).headers["Location"]
    sound = decoded(server.http.get(link).content)
    assert abs(len(sound.samples) - (2 * rate + 1) * sound.rate / rate) <= 1
    assert sound.resembles_the_sine()
    listing = server.http.get("/api/records", params={"id_user": user.id}, headers=user.bearer)
    (record,) = listing.json()["records"]
    assert record["duration"] == pytest.approx(len(sound.samples) / sound.rate)


# Channels

RATE = 8000
EXTENSION = bytes.fromhex("000000001000800000aa00389b71")


def tone(channel: int) -> float:
    """The pitch of a channel in Hz, of which there are whole periods in a second."""
    return 300 * (channel + 1)


def tones(channels: int, mask: int | None) -> bytes:
    """A second with a tone of its own at full level in each channel; None: no mask at all."""
    frames = (
        round(32000 * math.sin(2 * math.pi * tone(channel) * n / RATE))
        for n in range(RATE)
        for channel in range(channels)
    )
    fmt = struct.pack("<HIIHH", channels, RATE, 2 * channels * RATE, 2 * channels, 16)
    if mask is None:
        fmt = struct.pack("<H", 1) + fmt
    else:
        fmt = struct.pack("<H", 0xFFFE) + fmt + struct.pack("<HHIH", 22, 16, mask, 1) + EXTENSION
    return riff(fmt, array("h", frames).tobytes())


@pytest.mark.parametrize(
    "channels, mask",
    [
        *((channels, None) for channels in range(1, 9)),
        *((channels, 0) for channels in range(1, 9)),
        # as the speakers are commonly laid out
        *((1, 0x4), (2, 0x3), (3, 0x7), (3, 0xB), (4, 0x33), (4, 0x107), (4, 0x603), (5, 0x37)),
        *((5, 0x607), (6, 0x3F), (6, 0x60F), (7, 0x70F), (7, 0x13F), (8, 0x63F), (8, 0xFF)),
        # and as nobody has them
        *((1, 0x8), (2, 0x600), (3, 0x1), (4, 0xFFFFFFFF), (6, 0x3F000), (8, 0x7)),
    ],
)
def test_no_channel_is_lost(server: Server, channels: int, mask: int | None) -> None:
    mp3 = server.convert(tones(channels, mask))
    sides = decoded(mp3).channels
    assert sides == min(channels, 2)
    samples = array("h", ffmpeg("-f", "s16le", stdin=mp3))
    assert len(samples) == sides * RATE
    heard = 0.0
    for channel in range(channels):
        turn = [cmath.exp(-2j * math.pi * tone(channel) * n / RATE) for n in range(RATE)]
        levels = [
            abs(sum(map(complex.__mul__, turn, map(complex, samples[side::sides])))) / RATE * 2
            for side in range(sides)
        ]
        assert max(levels) > 0.05 * 32000, f"channel {channel} has {levels}"
        heard += sum(level**2 / 2 for level in levels)
    # There is nothing else: no channel is twice in it, and nothing is clipped.
    assert sum(sample**2 for sample in samples) / RATE == pytest.approx(heard, rel=0.02)


@pytest.mark.parametrize("channels", [9, 16, 255])
def test_more_channels_are_refused_with_their_number(
    server: Server, user: User, channels: int
) -> None:
    fmt = struct.pack("<HHIIHH", 1, channels, RATE, 2 * channels * RATE, 2 * channels, 16)
    detail = problem(server.upload(user, riff(fmt, bytes(20 * channels))), 422)
    assert f"{channels} channels" in detail and "8" in detail


# Tags


def latin(**tags: str) -> bytes:
    """A chunk of INFO tags as Windows writes them."""
    texts = [chunk(name.encode(), text.encode("cp1252") + b"\0") for name, text in tags.items()]
    return chunk(b"LIST", b"INFO" + b"".join(texts))


ID3: Any = mutagen.id3.ID3  # it has no types


def frames(mp3: bytes) -> dict[str, str]:
    """The text frames of an MP3's ID3 tag, as players read them."""
    return {frame.FrameID: str(frame) for frame in ID3(io.BytesIO(mp3)).values()}


NOISE = chunk(b"junk", b"INAMx")
TAGGED = {
    "before": wav(5555, before=info(INAM="Título", IART="Боб", ICRD="2024")),
    "behind": wav(5555, after=info(INAM="Título", IART="Боб", ICRD="2024")),
    "on both sides": wav(
        5555, before=info(INAM="Título"), after=info(INAM="other", IART="Боб", ICRD="2024")
    ),
    "in two chunks": wav(5555, after=info(INAM="Título") + info(IART="Боб", ICRD="2024")),
    "behind others": wav(5555, after=NOISE * 3 + info(INAM="Título", IART="Боб", ICRD="2024")),
    "behind odd audio": wav(
        5555, encoding="u8", after=info(INAM="Título", IART="Боб", ICRD="2024")
    ),
    "in RF64": wav(5555, form=b"RF64", after=info(INAM="Título", IART="Боб", ICRD="2024")),
}


@pytest.mark.parametrize("content", TAGGED.values(), ids=TAGGED)
def test_tags_are_kept_wherever_they_are(server: Server, content: bytes) -> None:
    mp3 = server.convert(content)
    assert frames(mp3) == {"TIT2": "Título", "TPE1": "Боб", "TDRC": "2024"}
    sound = decoded(mp3)
    assert len(sound.samples) == 5555
    assert sound.resembles_the_sine()


@pytest.mark.parametrize("where", ["before", "after"])
def test_tags_of_windows_become_utf8(server: Server, where: str) -> None:
    tags = latin(INAM="Schöne Grüße … „Welt“", ICOP="© 1999 Žofie", ISFT="CoolEdit™")
    content = wav(before=tags) if where == "before" else wav(after=tags)
    assert frames(server.convert(content)) == {
        "TIT2": "Schöne Grüße … „Welt“",
        "TCOP": "© 1999 Žofie",
        "TSSE": "CoolEdit™",
    }


def test_every_tag_has_its_frame(server: Server) -> None:
    tags = {"INAM": "a", "IART": "b", "IPRD": "c", "ICRD": "2001", "IGNR": "e", "ITRK": "6"}
    tags |= {"ICMT": "g", "ICOP": "h", "ISFT": "i", "ISRC": "nowhere to put it"}
    assert frames(server.convert(wav(after=info(**tags)))) == {
        **{"TIT2": "a", "TPE1": "b", "TALB": "c", "TDRC": "2001", "TCON": "e", "TRCK": "6"},
        **{"COMM": "g", "TCOP": "h", "TSSE": "i"},
    }


@pytest.mark.parametrize("tags", [b"", info(), info(INAM=""), info(INAM=" "), info(IXYZ="?")])
def test_without_tags_there_is_no_tag(server: Server, tags: bytes) -> None:
    assert not server.convert(wav(after=tags)).startswith(b"ID3")


# Refusals, in the service's own words


def compressed(tag: int) -> bytes:
    return riff(struct.pack("<HHIIHHH", tag, 1, 44100, 16000, 1, 0, 0), bytes(1000))


def integers(bits: int) -> bytes:
    fmt = struct.pack("<HHIIHH", 1, 1, 44100, 44100 * bits // 8, bits // 8, bits)
    return riff(fmt, bytes(bits * 100))


SIZELESS = b"RF64" + struct.pack("<I", UNKNOWN) + wav(5555)[8:40] + struct.pack("<I", UNKNOWN)
REFUSED = {
    "RIFX": (b"RIFX" + wav()[4:], "big-endian RIFX"),
    "Wave64": (bytes.fromhex("726966662e91cf11a5d628db04c10000") + bytes(1000), "Sony Wave64"),
    "AIFF": (b"FORM" + bytes(4) + b"AIFF" + bytes(1000), "AIFF"),
    "FLAC": (b"fLaC" + bytes(1000), "FLAC"),
    "Ogg": (b"OggS" + bytes(1000), "Ogg"),
    "MP3": (b"ID3\3" + bytes(1000), "MP3"),
    "MP3 inside": (compressed(0x55), "0x0055 (MP3)"),
    "AAC inside": (compressed(0xFF), "0x00ff (AAC)"),
    "WMA inside": (compressed(0x161), "0x0161 (WMA)"),
    "AC-3 inside": (compressed(0x2000), "0x2000 (AC-3)"),
    "another codec": (compressed(0x1234), "codec 0x1234 (unknown)."),
    "integers of 64 bits": (integers(64), "integers of 64 bits"),
    "RF64 without ds64": (SIZELESS + bytes(1000), "RF64 file lacks its sizes"),
    "24 bits in 4 bytes, not extensible": (
        riff(struct.pack("<HHIIHH", 1, 1, 44100, 176400, 4, 24), bytes(1000)),
        "contradicts itself: 1 channels of 24 bits in blocks of 4 bytes",
    ),
}


@pytest.mark.parametrize("content, found", REFUSED.values(), ids=REFUSED)
def test_refusal_names_what_it_found(
    server: Server, user: User, content: bytes, found: str
) -> None:
    assert found in problem(server.upload(user, content), 422)


def test_words_of_ffmpeg_reach_no_caller(start_server: StartServer, tmp_path: Path) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    script(ffmpeg, "cat > /dev/null; echo 'pipe:0: Invalid data found' >&2; exit 1")
    server = start_server(FFMPEG=str(ffmpeg))
    detail = problem(server.upload(server.register(), wav()), 503)
    assert detail == "The encoder failed. Send the file again."
