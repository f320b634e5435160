import pytest

from support import Server, User
from wav import PCM, UNKNOWN, chunk, decoded, gsm, info, noise, pcm_format, recoded, riff, tags, wav

MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@pytest.mark.parametrize(
    "encoding, channels",
    [*((encoding, 1) for encoding in PCM), ("s16", 2), ("s16", 6), ("f32", 6)],
)
def test_pcm_is_converted_exactly(server: Server, encoding: str, channels: int) -> None:
    content = wav(5555, encoding=encoding, channels=channels)
    mp3 = server.convert(content)
    assert b"Xing" in mp3[:1000]  # says how long it is and what to leave out
    sound = decoded(mp3)
    assert (sound.rate, sound.channels, len(sound.samples)) == (44100, min(channels, 2), 5555)
    assert sound.resembles_the_sine()


@pytest.mark.parametrize("rate", MP3_RATES)
def test_rate_of_mp3_is_kept(server: Server, rate: int) -> None:
    sound = decoded(server.convert(wav(rate // 3, rate=rate)))
    assert (sound.rate, len(sound.samples)) == (rate, rate // 3)
    assert sound.resembles_the_sine()


@pytest.mark.parametrize("rate", [8001, 10000, 14700, 37800, 64000, 88200, 96000, 176400, 192000])
def test_other_rate_is_resampled_to_the_same_duration(server: Server, rate: int) -> None:
    sound = decoded(server.convert(wav(rate // 3, rate=rate)))
    assert sound.rate in MP3_RATES
    # In units of 1 / (rate * sound.rate) seconds: at most one sample of the new rate.
    assert abs(len(sound.samples) * rate - rate // 3 * sound.rate) <= rate
    assert sound.resembles_the_sine()


# An MP3 frame has 1152 samples, or 576 at low rates.
@pytest.mark.parametrize("rate", [22050, 44100])
@pytest.mark.parametrize(
    "samples", [1, 2, 46, 47, 48, 575, 576, 577, 1105, 1151, 1152, 1153, 11521, 11566, 11567]
)
def test_any_number_of_samples_is_kept(server: Server, rate: int, samples: int) -> None:
    assert len(decoded(server.convert(wav(samples, rate=rate))).samples) == samples


def test_long_noise_is_converted_exactly(server: Server) -> None:
    assert len(decoded(server.convert(noise(8_000_000))).samples) == 2_000_000


@pytest.mark.parametrize("codec, channels, rate", [("pcm_alaw", 1, 8000), ("pcm_mulaw", 2, 44100)])
def test_g711_is_converted_exactly(server: Server, codec: str, channels: int, rate: int) -> None:
    content = recoded(wav(5555, rate=rate, channels=channels), codec)
    sound = decoded(server.convert(content))
    assert (sound.rate, sound.channels, len(sound.samples)) == (rate, channels, 5555)
    assert sound.resembles_the_sine()


# Samples that fill 10 blocks of the 1024 bytes that ffmpeg makes.
@pytest.mark.parametrize(
    "codec, channels, samples",
    [
        ("adpcm_ms", 2, 10120),
        ("adpcm_ima_wav", 1, 20410),
    ],
)
def test_adpcm_is_converted_exactly(
    server: Server, codec: str, channels: int, samples: int
) -> None:
    content = recoded(wav(samples, rate=22050, channels=channels), codec)
    sound = decoded(server.convert(content))
    assert (sound.rate, sound.channels, len(sound.samples)) == (22050, channels, samples)
    assert sound.resembles_the_sine()


def test_gsm_is_converted_exactly(server: Server) -> None:
    sound = decoded(server.convert(gsm(50)))
    assert (sound.rate, sound.channels, len(sound.samples)) == (8000, 1, 16000)
    assert any(sound.samples)


def test_blocks_that_are_mostly_damaged_are_refused(server: Server, user: User) -> None:
    content = recoded(wav(60_000), "adpcm_ms")
    start = content.index(b"data") + 8
    response = server.upload(user, content[:start] + b"\xff" * len(content[start:]))
    assert response.status_code == 422
    assert "damaged" in response.json()["detail"]


ODD = chunk(b"junk", b"odd")
LAYOUTS = {
    "size unknown": wav(5555, declared=UNKNOWN),
    "chunks around odd data": wav(5555, encoding="u8", before=ODD, after=ODD + info(INAM="even")),
    "rf64": wav(5555, form=b"RF64", before=ODD, after=ODD),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_the_file_does_not_matter(server: Server, content: bytes) -> None:
    sound = decoded(server.convert(content))
    assert len(sound.samples) == 5555
    assert sound.resembles_the_sine()


def test_quiet_wav_is_not_taken_for_another_format(server: Server) -> None:
    """ffmpeg would rather believe in ACT, which voice recorders write and which begins as a WAV."""
    content = riff(pcm_format(1, 8, 8000, 1), bytes(256 - 44) + b"\x84" + bytes(4000))
    assert len(decoded(server.convert(content)).samples) == 256 - 44 + 1 + 4000


def test_tags_are_kept(server: Server) -> None:
    content = wav(before=info(INAM="Título", IART="Bob", ICRD="2024", ICMT="Good; bad = ugly"))
    assert {"title": "Título", "artist": "Bob", "date": "2024"}.items() <= tags(
        server.convert(content)
    ).items()
