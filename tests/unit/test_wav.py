"""What a WAV says, what ffmpeg gets of it, and what becomes of its tags."""

import asyncio
import hashlib
import math
import random
import struct
import subprocess
from array import array
from dataclasses import astuple

import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from starlette.exceptions import HTTPException

from service import (
    ARGUMENTS,
    EXTENSIBLE_GUID,
    MAX_CHUNKS,
    SPEAKERS,
    Wav,
    id3_tag,
    info_tags,
    parse_wav_header,
    plain_wav_header,
)
from wav import (
    PCM,
    SPEECH,
    UNKNOWN,
    chunk,
    ffmpeg,
    gsm,
    info,
    noise,
    pcm_format,
    recoded,
    riff,
    tags,
    wav,
)

STEREO = pcm_format(1, 16, 44100, 2)
AUDIO = bytes(4000)
PLAIN = riff(STEREO, AUDIO)
ODD = chunk(b"junk", b"odd")


HALF_A_DS64 = b"RF64\xff\xff\xff\xffWAVE" + chunk(b"ds64", bytes(8))


def refusal(content: bytes) -> str:
    """Why a file is refused by its header."""
    with pytest.raises(HTTPException) as refused:
        parse_wav_header(content)
    assert refused.value.status_code == 422
    return refused.value.detail


def formatted(
    tag: int, channels: int, rate: int, block: int, bits: int, more: bytes = b""
) -> bytes:
    """A file with these fields in its format, whether they go together or not."""
    return riff(struct.pack("<HHIIHH", tag, channels, rate, 0, block, bits) + more, AUDIO)


def extensible(tag: int, channels: int, bits: int, valid: int, mask: int) -> bytes:
    more = struct.pack("<HHIH", 22, valid, mask, tag) + EXTENSIBLE_GUID
    return formatted(0xFFFE, channels, 44100, channels * bits // 8, bits, more)


# What the header says


# Format tag, channels, rate, bytes of a block, bits, speakers; and where the audio begins.
@pytest.mark.parametrize(
    "content, expected",
    [
        (PLAIN, (1, 2, 44100, 4, 16, 0, 44)),
        (riff(STEREO + b"\0\0", AUDIO), (1, 2, 44100, 4, 16, 0, 46)),
        (riff(pcm_format(1, 24, 8000, 1), AUDIO), (1, 1, 8000, 3, 24, 0, 44)),
        (riff(pcm_format(3, 64, 44100, 1), AUDIO), (3, 1, 44100, 8, 64, 0, 44)),
        (riff(pcm_format(6, 8, 8000, 1), AUDIO), (6, 1, 8000, 1, 8, 0, 44)),
        (formatted(2, 2, 22050, 1024, 4), (2, 2, 22050, 1024, 4, 0, 44)),
        (formatted(0x11, 1, 22050, 256, 4), (0x11, 1, 22050, 256, 4, 0, 44)),
        (formatted(0x31, 1, 8000, 65, 0), (0x31, 1, 8000, 65, 0, 0, 44)),
        # samples are as wide as their bytes, however many of the bits are valid
        (formatted(1, 1, 44100, 2, 12), (1, 1, 44100, 2, 16, 0, 44)),
        (formatted(1, 1, 44100, 4, 25), (1, 1, 44100, 4, 32, 0, 44)),
        (formatted(1, 2, 44100, 0, 16), (1, 2, 44100, 4, 16, 0, 44)),
        (extensible(1, 2, 32, 20, 3), (1, 2, 44100, 8, 32, 0, 68)),
        (extensible(1, 2, 16, 1, 3), (1, 2, 44100, 4, 16, 0, 68)),
        (extensible(3, 2, 32, 32, 3), (3, 2, 44100, 8, 32, 0, 68)),
        # speakers are taken at their word, unless it is unheard of
        (extensible(1, 4, 16, 16, 0x107), (1, 4, 44100, 8, 16, 0x107, 68)),
        (extensible(1, 4, 16, 16, 0), (1, 4, 44100, 8, 16, 0x33, 68)),
        (extensible(1, 4, 16, 16, UNKNOWN), (1, 4, 44100, 8, 16, 0x33, 68)),
        (formatted(1, 6, 44100, 12, 16), (1, 6, 44100, 12, 16, 0x3F, 44)),
        # other chunks
        (riff(STEREO, AUDIO, before=ODD), (1, 2, 44100, 4, 16, 0, 56)),
        (riff(STEREO, AUDIO, before=PLAIN), (1, 2, 44100, 4, 16, 0, 44 + len(PLAIN))),
        (riff(STEREO, AUDIO, before=ODD * 998), (1, 2, 44100, 4, 16, 0, 44 + 12 * 998)),
        (riff(STEREO, AUDIO, after=chunk(b"fmt ", b"")), (1, 2, 44100, 4, 16, 0, 44)),
        # RF64 and BW64
        (riff(STEREO, AUDIO, form=b"RF64"), (1, 2, 44100, 4, 16, 0, 80)),
        (riff(STEREO, AUDIO, form=b"BW64"), (1, 2, 44100, 4, 16, 0, 80)),
        (b"RF64" + PLAIN[4:], (1, 2, 44100, 4, 16, 0, 44)),
    ],
)
def test_header(content: bytes, expected: tuple[int, ...]) -> None:
    header = parse_wav_header(content)
    assert header
    assert astuple(header) == (*expected, 4000, {})


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        riff(STEREO, AUDIO, before=ODD + info(INAM="Title") + ODD),
        riff(STEREO, AUDIO, form=b"RF64", before=ODD),
        extensible(1, 6, 24, 20, 0x3F),
    ],
)
def test_header_that_is_not_complete_says_nothing(content: bytes) -> None:
    header = parse_wav_header(content)
    assert header
    assert not any(parse_wav_header(content[:size]) for size in range(header.start))
    assert parse_wav_header(content[: header.start]) == header


@pytest.mark.parametrize(
    "content",
    [
        b"RIFF\xff\xff\xff\xffWAVE" + chunk(b"fmt ", STEREO),
        b"RIFF\xff\xff\xff\xffWAVEjunk\xf0\xff\xff\xff" + AUDIO,
        b"RIFF\xff\xff\xff\xffWAVEfmt \xff\xff\xff\xff" + AUDIO,
    ],
)
def test_header_that_is_never_complete_says_nothing(content: bytes) -> None:
    assert parse_wav_header(content) is None


@pytest.mark.parametrize(
    "content, detail",
    [
        (bytes(12), "not a WAV"),
        (b"OggS" + PLAIN[4:], "not a WAV"),
        (b"RIFX" + PLAIN[4:], "not a WAV"),
        (b"RIFF\x64\0\0\0AVI " + PLAIN[12:], "not a WAV"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", "not a WAV"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a WAV"),
        (b"RIFF\x64\0\0\0WAVE" + chunk(b"data", AUDIO), "no format"),
        (riff(STEREO[:15], AUDIO), "no format"),
        (riff(b"", AUDIO, before=chunk(b"fmt ", b"")), "no format"),
        (riff(STEREO, AUDIO, before=chunk(b"fmt ", STEREO)), "two formats"),
        (riff(STEREO, AUDIO, before=chunk(b"fmt ", STEREO) + ODD), "two formats"),
        (riff(STEREO, AUDIO, before=ODD * MAX_CHUNKS), f"{MAX_CHUNKS} chunks"),
        (riff(STEREO, AUDIO, form=b"RF64", declared=0), "lacks its sizes"),
        (riff(STEREO, AUDIO, form=b"RF64").replace(b"ds64", b"junk"), "lacks its sizes"),
        (HALF_A_DS64 + PLAIN[12:40] + b"\xff" * 4, "lacks its sizes"),
        # codecs
        (formatted(0, 1, 44100, 2, 16), "codec 0x0000"),
        (formatted(0x55, 1, 44100, 1, 0), "codec 0x0055"),
        (formatted(0x2000, 2, 48000, 1, 0), "codec 0x2000"),
        (formatted(0x028F, 1, 16000, 1, 0), "codec 0x028f"),
        (formatted(0xFFFE, 2, 44100, 4, 16), "codec 0xfffe"),
        (formatted(0xFFFE, 2, 44100, 4, 16, bytes(9)), "codec 0xfffe"),
        (extensible(0x55, 2, 16, 16, 3), "codec 0x0055"),
        (extensible(0xFFFE, 2, 16, 16, 3), "codec 0xfffe"),
        # what does not go together
        (formatted(1, 0, 44100, 0, 16), "0 channels of 16 bits"),
        (formatted(1, 1, 44100, 0, 0), "1 channels of 0 bits"),
        (formatted(1, 2, 44100, 7, 16), "blocks of 7 bytes"),
        (formatted(1, 2, 44100, 4, 24), "2 channels of 24 bits"),
        (formatted(1, 1, 44100, 5, 40), "1 channels of 40 bits"),
        (formatted(1, 1, 44100, 65535, 65535), "65535 bits"),
        (formatted(3, 1, 44100, 2, 16), "1 channels of 16 bits"),
        (formatted(6, 1, 8000, 2, 16), "1 channels of 16 bits"),
        (formatted(1, 65535, 44100, 4, 16), "65535 channels"),
        (formatted(2, 0, 22050, 1024, 4), "0 channels of 4 bits"),
        (formatted(2, 3, 22050, 1024, 4), "3 channels of 4 bits"),
        (formatted(2, 1, 22050, 0, 4), "blocks of 0 bytes"),
        (formatted(2, 2, 22050, 13, 4), "blocks of 13 bytes"),
        (formatted(0x11, 1, 22050, 1024, 3), "1 channels of 3 bits"),
        (formatted(0x31, 2, 8000, 65, 0), "2 channels"),
        (formatted(0x31, 1, 8000, 0, 0), "blocks of 0 bytes"),
        (formatted(0x31, 1, 8000, 64, 0), "blocks of 64 bytes"),
        # more samples in a block than its header can say
        (formatted(2, 1, 22050, 0xFFFF, 4), "blocks of 65535 bytes"),
        (formatted(0x11, 1, 22050, 0xFFFF, 4), "blocks of 65535 bytes"),
        (formatted(0x31, 1, 8000, 65 * 205, 0), "blocks of 13325 bytes"),
        # limits
        (formatted(1, 9, 44100, 18, 16), "9 channels, and up to 8"),
        (formatted(1, 65535, 44100, 65535, 8), "65535 channels, and up to 8"),
        (formatted(1, 1, 0, 2, 16), "sample rate: 0 Hz"),
        (formatted(1, 1, 999, 2, 16), "sample rate: 999 Hz"),
        (formatted(1, 1, 1_000_001, 2, 16), "sample rate: 1000001 Hz"),
        (formatted(1, 1, UNKNOWN, 2, 16), f"sample rate: {UNKNOWN} Hz"),
    ],
)  # fmt: skip
def test_header_that_is_refused_is_told_why(content: bytes, detail: str) -> None:
    assert detail in refusal(content)


@pytest.mark.parametrize("rate", [1000, 1_000_000])
def test_sample_rate_at_its_limit_is_taken(rate: int) -> None:
    assert parse_wav_header(formatted(1, 1, rate, 2, 16))


# Of the whole file, less eight bytes, and of the audio. It has 4000 bytes of that.
@pytest.mark.parametrize(
    "whole, size, declared",
    [
        (4036, 4000, 4000),
        (4036, 3999, 3999),
        (0, 4000, 4000),
        (UNKNOWN, 4000, 4000),
        (4036, 1 << 30, 1 << 30),
        (4036, 0xFFFFFFF0, 0xFFFFFFF0),
        # written by who cannot come back
        (0, 0, None),
        (36, 0, None),
        (UNKNOWN, 0, None),
        (UNKNOWN, UNKNOWN, None),
        (0x80000024, 0x80000000, None),
        (0x7FFFF024, 0x7FFFF000, None),
        (0x7FFFFFFF, 0x7FFFFFDB, None),
        # the size of the file is known, and it does not end here
        (37, 0, 0),
        (4036, 0, 0),
    ],
)
def test_declared_size(whole: int, size: int, declared: int | None) -> None:
    content = b"RIFF" + struct.pack("<I", whole) + PLAIN[8:40] + struct.pack("<I", size) + AUDIO
    header = parse_wav_header(content)
    assert header and header.declared == declared


@pytest.mark.parametrize("size", [1, 4000, 1 << 40])
def test_declared_size_of_rf64(size: int) -> None:
    header = parse_wav_header(riff(STEREO, AUDIO, form=b"RF64", declared=size))
    assert header and header.declared == size


@pytest.mark.parametrize("seed", range(5))
def test_mutated_header_is_refused_or_fit_for_ffmpeg(seed: int) -> None:
    chance = random.Random(seed)
    whole = [
        PLAIN,
        riff(STEREO, AUDIO, form=b"RF64"),
        gsm(2),
        extensible(1, 6, 24, 20, 0x3F),
        formatted(0x11, 1, 22050, 256, 4),
    ][seed]
    whole = whole[:12] + info(INAM="Title") + whole[12:]
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 5)):
            content[chance.randrange(120)] = chance.choice([0, 1, 2, 0xFF, chance.randrange(256)])
        try:
            header = parse_wav_header(bytes(content))
        except HTTPException as refused:
            assert refused.status_code == 422
        else:
            assert not header or len(plain_wav_header(header)) <= 68


# What ffmpeg gets


def piped(content: bytes, *arguments: str) -> "array[int]":
    """What ffmpeg hears in content as the service gives it, with arguments for its output."""
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "wav", "-i", "pipe:0"]
    command += [*arguments, "-f", "s16le", "pipe:1"]
    return array("h", subprocess.run(command, input=content, stdout=-1, check=True).stdout)


def given(content: bytes) -> bytes:
    """What ffmpeg gets of a file."""
    header = parse_wav_header(content)
    assert header
    end = None if header.declared is None else header.start + header.declared
    return plain_wav_header(header) + content[header.start : end]


CODECS = {
    **{f"{name}, {n} channels": wav(2222, encoding=name, channels=n)
       for name in PCM for n in (1, 2, 6)},
    **{f"{name}, {n} channels": recoded(wav(2222, rate=8000, channels=n), name)
       for name in ("pcm_alaw", "pcm_mulaw") for n in (1, 2)},
    **{f"{name}, {n} channels": recoded(wav(20_000, rate=22050, channels=n), name)
       for name in ("adpcm_ms", "adpcm_ima_wav") for n in (1, 2)},
    "gsm": gsm(20),
    "chunks around": wav(2222, before=ODD + info(INAM="Title"), after=ODD + info(IART="Bob")),
}  # fmt: skip


@pytest.mark.parametrize("content", CODECS.values(), ids=CODECS)
def test_ffmpeg_hears_through_a_pipe_what_it_hears_in_the_file(content: bytes) -> None:
    expected = array("h", ffmpeg("-f", "s16le", stdin=content))
    assert piped(given(content)) == expected
    assert any(expected)


@pytest.mark.parametrize(
    "content, bits",
    [
        (extensible(1, 2, 16, 12, 3), 16),
        (extensible(1, 2, 24, 20, 3), 24),
        (extensible(1, 2, 32, 20, 3), 32),
        (extensible(1, 2, 32, 24, 3), 32),
        (formatted(1, 2, 44100, 4, 12), 16),
        (formatted(1, 2, 44100, 6, 20), 24),
    ],
)
def test_fewer_valid_bits_make_no_noise(content: bytes, bits: int) -> None:
    """ffmpeg would choose its decoder by them, and not by the width of a sample."""
    sound = random.Random(bits).randbytes(len(AUDIO))
    plain = riff(pcm_format(1, bits, 44100, 2), sound)
    assert piped(given(content[: -len(AUDIO)] + sound)) == piped(plain)


@pytest.mark.parametrize(
    "channels, mask", [(channels, mask) for channels, masks in SPEAKERS.items() for mask in masks]
)
def test_each_speaker_is_heard(channels: int, mask: int) -> None:
    length = 1000  # samples in which a channel sounds, one after the other
    samples = array("h")
    for sounding in range(channels):
        for n in range(length):
            tone = round(20_000 * math.sin(n / 3))
            samples.extend(tone if channel == sounding else 0 for channel in range(channels))
    fmt = struct.pack("<HHIIHH", 0xFFFE, channels, 44100, 0, 2 * channels, 16)
    fmt += struct.pack("<HHIH", 22, 16, mask, 1) + EXTENSIBLE_GUID
    words = ARGUMENTS.split()
    options = [
        option
        for name in ("-rematrix_maxval", "-lfe_mix_level")
        for option in (name, words[words.index(name) + 1])
    ]
    mixed = piped(given(riff(fmt, samples.tobytes())), *options, "-ac", "2")
    for sounding in range(channels):
        heard = mixed[2 * length * sounding : 2 * length * (sounding + 1)]
        assert 1000 < max(heard) < 0x7FFF


# The way through the service


def reading(
    content: bytes, size: int = 1 << 16, limit: int = 1 << 30, *, hashed: bool = False
) -> Wav:
    """A WAV that arrives in pieces of this size."""
    pieces = iter([content[start : start + size] for start in range(0, len(content), size)])

    async def read() -> bytes:
        return next(pieces, b"")

    return Wav(read, limit, hashlib.sha256() if hashed else None)


def samples(wav: Wav) -> bytes:
    """The samples of a WAV, read to the end."""

    async def read() -> bytes:
        await wav.read_header()
        found = bytearray()
        while data := await wav.read_samples():
            found += data
        return bytes(found)

    return asyncio.run(read())


def refused(wav: Wav) -> tuple[int, str]:
    with pytest.raises(HTTPException) as refused:
        samples(wav)
    return refused.value.status_code, refused.value.detail


BYTES = bytes(range(1, 252))
MONO = pcm_format(1, 8, 8000, 1)
LAYOUTS = {
    "plain": riff(MONO, BYTES),
    "size 0": riff(MONO, BYTES, declared=0)[:-1],
    "size unknown": riff(MONO, BYTES, declared=UNKNOWN)[:-1],
    "without the last padding": riff(MONO, BYTES)[:-1],
    "chunks before": riff(MONO, BYTES, before=ODD + info(INAM="odd") + chunk(b"bext", bytes(7000))),
    "chunks after": riff(MONO, BYTES, after=info(INAM="odd") + ODD),
    "half a chunk after": riff(MONO, BYTES, after=ODD[:6]),
    "junk after": riff(MONO, BYTES, after=b"\xff" * 1000),
    "rf64": riff(MONO, BYTES, form=b"RF64", before=ODD, after=ODD),
    "a format after": riff(MONO, BYTES, after=chunk(b"fmt ", STEREO) + chunk(b"data", BYTES)),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_samples_are_what_is_declared_and_nothing_else(content: bytes, size: int) -> None:
    wav = reading(content, size, hashed=True)
    assert samples(wav) == BYTES
    assert (wav.audio, wav.received) == (len(BYTES), len(content))
    assert wav.sha256 and wav.sha256.digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("form", [b"RIFF", b"RF64"])
@pytest.mark.parametrize("missing", [1, 100, 250])
def test_truncated_audio_is_refused_with_both_sizes(form: bytes, missing: int) -> None:
    content = riff(MONO, BYTES, form=form)[:-1]
    status, detail = refused(reading(content[:-missing]))
    assert status == 422
    assert f"declares {len(BYTES)} bytes of audio, {len(BYTES) - missing} bytes" in detail


@pytest.mark.parametrize(
    "content, status, detail",
    [
        (b"", 422, "ends before its audio"),
        (PLAIN[:30], 422, "ends before its audio"),
        (PLAIN[:12] + b"junk\xff\xff\xff\xff" + bytes(1000), 422, "ends before its audio"),
        (PLAIN[:12] + b"junk\xff\xff\xff\xff" + bytes(5 << 20), 422, f"{4 << 20} bytes before"),
        (PLAIN[:12] + ODD * 2000, 422, "1000 chunks"),
        (riff(STEREO, b"\x72\xf8\x1f\x4e" + AUDIO), 422, "S/PDIF"),
        (noise(2 << 20), 413, f"{1 << 20} bytes are allowed"),
        (riff(MONO, BYTES, after=bytes(1 << 20)), 413, f"{1 << 20} bytes are allowed"),
    ],
)
def test_file_that_is_refused_is_told_why(content: bytes, status: int, detail: str) -> None:
    limit = 1 << 20 if status == 413 else 1 << 30
    found, text = refused(reading(content, limit=limit))
    assert (found, detail in text) == (status, True), text


# Tags


@pytest.mark.parametrize(
    "body, expected",
    [
        (info(INAM="Title", IART="Bob")[8:], {b"INAM": b"Title", b"IART": b"Bob"}),
        (info(INAM="odd", IART="even")[8:], {b"INAM": b"odd", b"IART": b"even"}),
        (b"INFO" + chunk(b"INAM", b"a\0b"), {b"INAM": b"a"}),
        (b"INFO" + chunk(b"INAM", b"no end"), {b"INAM": b"no end"}),
        (b"INFOINAM\xff\xff\xff\xffhalf", {b"INAM": b"half"}),
        (b"INFOINAM\4", {}),
        (b"INFO", {}),
        (b"", {}),
        (b"adtl" + chunk(b"labl", b"label"), {}),
    ],
)
def test_info_tags(body: bytes, expected: dict[bytes, bytes]) -> None:
    assert info_tags(body) == expected


def test_info_tags_are_a_hundred_at_most() -> None:
    assert len(info_tags(b"INFO" + b"".join(chunk(b"%04d" % n, b"") for n in range(45_000)))) == 100


def tagged(before: bytes = b"", after: bytes = b"", audio: bytes = AUDIO) -> dict[bytes, bytes]:
    """The tags of a WAV with these chunks around its audio."""
    wav = reading(riff(MONO, audio, before=before, after=after))
    samples(wav)
    return wav.tags()


ADTL = chunk(b"LIST", b"adtl" + chunk(b"labl", b"label"))


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (b"", b"", {}),
        (ADTL + info(INAM="before") + ADTL, b"", {b"INAM": b"before"}),
        (b"", ODD + ADTL + info(INAM="after"), {b"INAM": b"after"}),
        (info(INAM="before"), info(INAM="after", IART="B"), {b"INAM": b"before", b"IART": b"B"}),
        (info(INAM="first") + info(INAM="second"), b"", {b"INAM": b"first"}),
        (b"", b"\xff" * 1000 + info(INAM="lost"), {}),
        (b"", chunk(b"junk", bytes(2 << 20)) + info(INAM="far away"), {}),
        (info(ICMT="x" * 100_000), b"", {b"ICMT": b"x" * ((64 << 10) - 12)}),
        (b"", info(ICMT="x" * 100_000), {b"ICMT": b"x" * ((64 << 10) - 12)}),
    ],
)  # fmt: skip
def test_tags_are_found_around_the_audio(
    before: bytes, after: bytes, expected: dict[bytes, bytes]
) -> None:
    assert tagged(before, after) == expected


def test_tags_are_found_behind_odd_audio_with_padding_and_without() -> None:
    with_padding = riff(MONO, BYTES, after=info(INAM="Title"))
    at = with_padding.index(b"LIST")
    for content in with_padding, with_padding[: at - 1] + with_padding[at:]:
        wav = reading(content)
        assert samples(wav) == BYTES
        assert wav.tags() == {b"INAM": b"Title"}


def test_id3_tag_is_as_the_standard_has_it() -> None:
    frame = b"TIT2\0\0\1\x49\0\0\3" + b"x" * 200  # sizes have seven bits a byte
    assert id3_tag({b"INAM": b"x" * 200}) == b"ID3\4\0\0\0\0\1\x53" + frame
    assert id3_tag({b"ISFT": b"x"}) == b"ID3\4\0\0\0\0\0\x0cTSSE\0\0\0\2\0\0\3x"
    assert id3_tag({b"ICMT": b"x"}) == b"ID3\4\0\0\0\0\0\x10COMM\0\0\0\6\0\0\3und\0x"


MP3 = ffmpeg("-f", "mp3", "-map_metadata", "-1", "-id3v2_version", "0", stdin=SPEECH)


@pytest.mark.parametrize(
    "written, expected",
    [
        ({}, {}),
        ({b"INAM": b"", b"IART": b" \t", b"XXXX": b"x"}, {}),
        (
            {b"INAM": b"t", b"IART": b"a", b"IPRD": b"b", b"ICRD": b"2024", b"IGNR": b"Rock"},
            {"title": "t", "artist": "a", "album": "b", "date": "2024", "genre": "Rock"},
        ),
        (
            {b"ITRK": b"3", b"ICMT": b"Good", b"ICOP": b"(c) Bob"},
            {"track": "3", "comment": "Good", "copyright": "(c) Bob"},
        ),
        ({b"IPRT": b"4"}, {"track": "4"}),
        ({b"INAM": "Título 🎤".encode()}, {"title": "Título 🎤"}),
        ({b"INAM": b"T\xedtulo \x80"}, {"title": "Título €"}),
        ({b"INAM": b"\x81\xff"}, {"title": "\ufffdÿ"}),
        ({b"INAM": b" x" * 32_000}, {"title": ("x " * 32_000).strip()}),
    ],
)
def test_players_read_the_tags(written: dict[bytes, bytes], expected: dict[str, str]) -> None:
    assert tags(id3_tag(written) + MP3) == expected
    assert bool(id3_tag(written)) == bool(expected)
