"""What an upload may choose for itself: quality and channels."""

import hashlib
import itertools

import pytest

from support import Server, StartServer, User, credentials, curl, curl_form, part, problem, query
from support import wait_for as wait
from wav import SPEECH, decoded, pcm_format, riff, sine, wav
from wire import link_of

STEREO = wav(channels=2)
FILE = part("file_wav", STEREO, "speech.wav")


def options(**values: object) -> list[bytes]:
    return [part(name, str(value)) for name, value in values.items()]


def convert(server: Server, user: User, content: bytes, **values: object) -> bytes:
    """Return the MP3 of content with these options."""
    parts = [*credentials(user), *options(**values), part("file_wav", content, "a.wav")]
    return server.http.get(link_of(server.send(*parts))).content


# What they do


@pytest.mark.parametrize("quality", range(10))
def test_quality_is_the_one_that_was_asked_for(
    start_server: StartServer, server: Server, user: User, quality: int
) -> None:
    chosen = convert(server, user, STEREO, quality=quality)
    if quality == 2:  # the default
        assert chosen == convert(server, user, STEREO)
    else:
        assert chosen != convert(server, user, STEREO)
    if quality in (0, 9):
        assert chosen == start_server(MP3_QUALITY=str(quality)).convert(STEREO)


def test_lower_quality_takes_less_room(server: Server, user: User) -> None:
    content = wav(100_000)
    sizes = [len(convert(server, user, content, quality=quality)) for quality in (0, 4, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def one_sided() -> bytes:
    """A sine on the left, nothing on the right."""
    samples = b"".join(
        int(0x7FFF * sample).to_bytes(2, "little", signed=True) + b"\0\0"
        for sample in sine(11025, 44100)
    )
    return riff(pcm_format(1, 16, 44100, 2), samples)


def test_one_channel_has_both_mixed(server: Server, user: User) -> None:
    sound = decoded(convert(server, user, one_sided(), channels=1))
    assert sound.channels == 1
    doubled = sound._replace(samples=type(sound.samples)("h", (2 * s for s in sound.samples)))
    assert doubled.resembles_the_sine()


@pytest.mark.parametrize("encoding", ["s16", "s24", "f32"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_recording_of_any_kind_becomes_mono_or_stereo(
    server: Server, user: User, channels: int, encoding: str
) -> None:
    content = wav(2000, channels=channels, encoding=encoding)
    for chosen in (1, 2):
        sound = decoded(convert(server, user, content, channels=chosen))
        assert (sound.channels, len(sound.samples)) == (chosen, 2000)


def test_channels_stay_as_they_are_where_none_are_asked_for(server: Server, user: User) -> None:
    for channels in (1, 2):
        content = wav(2000, channels=channels)
        assert decoded(convert(server, user, content, quality=5)).channels == channels


@pytest.mark.parametrize(
    "quality, rate", [(0, 44100), (4, 16000), (6, 8000), (9, 22050), (6, 48000)]
)
def test_length_is_exact_whatever_the_options(
    server: Server, user: User, quality: int, rate: int
) -> None:
    for samples, channels in itertools.product((1, 576, 1153, 20_001), (1, 2)):
        content = wav(samples, rate=rate, channels=2)
        sound = decoded(convert(server, user, content, quality=quality, channels=channels))
        assert (sound.channels, sound.rate, len(sound.samples)) == (channels, rate, samples)


def test_length_is_exact_where_the_rate_is_changed_too(server: Server, user: User) -> None:
    for samples in (1, 20, 37_800):
        content = wav(samples, rate=37_800, channels=2)
        sound = decoded(convert(server, user, content, quality=7, channels=1))
        assert sound.channels == 1
        assert len(sound.samples) == round(samples / 37_800 * sound.rate)


def test_options_for_speech_take_a_fraction_of_the_room(server: Server, user: User) -> None:
    content = wav(441_000, channels=2)
    sizes = []
    for chosen in ([], ["-F", "quality=6", "-F", "channels=1"]):
        reply = curl(
            *chosen, *curl_form(user), server.url + "/api/upload_audiorecord/", stdin=content
        )
        assert reply.status == 201
        sizes.append(len(curl(reply.json()["URL for download"]).body))
    assert sizes[1] < 0.7 * sizes[0]


def test_encoder_kept_ready_waits_for_an_upload_without_options(server: Server, user: User) -> None:
    def spare() -> int | None:
        encoders = server.encoders()
        return encoders[0].pid if len(encoders) == 1 else None

    convert(server, user, SPEECH)
    before = wait(spare)
    convert(server, user, SPEECH, quality=6)
    convert(server, user, SPEECH, channels=1)
    assert wait(spare) == before
    convert(server, user, SPEECH)
    wait(lambda: spare() not in (None, before))


# Where they stand


def test_options_stand_anywhere_before_a_file_that_streams(server: Server, user: User) -> None:
    before = [*credentials(user), *options(quality=6, channels=1)]
    expected = convert(server, user, STEREO, quality=6, channels=1)
    for parts in list(itertools.permutations(before))[::5]:
        assert server.http.get(link_of(server.send(*parts, FILE))).content == expected


def test_options_stand_anywhere_where_the_file_comes_first(server: Server, user: User) -> None:
    expected = convert(server, user, STEREO, quality=6, channels=1)
    quality, channels = options(quality=6, channels=1)
    token, id_user = credentials(user)
    for parts in (
        (quality, channels, FILE, token, id_user),
        (FILE, quality, channels, token, id_user),
        (FILE, token, id_user, channels, quality),
        (quality, FILE, token, channels, id_user),
        (token, FILE, quality, id_user, channels),
    ):
        assert server.http.get(link_of(server.send(*parts))).content == expected


@pytest.mark.parametrize("option", [{"quality": 6}, {"channels": 1}])
def test_option_behind_a_file_that_streams_is_refused(
    server: Server, user: User, option: dict[str, int]
) -> None:
    response = server.send(*credentials(user), FILE, *options(**option))
    detail = problem(response, 422)
    assert next(iter(option)) in detail and "before file_wav" in detail
    assert server.records(user) == 0


# What they may be


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize(
    "value", ["", "-1", "+1", "1.5", "1e0", "0x1", " 1", "1\n", "one", "٣", "1\0", "9" * 999]
)
@pytest.mark.parametrize("name", ["quality", "channels"])
def test_value_that_is_not_a_number_is_refused(
    server: Server, user: User, name: str, value: str, file_first: bool
) -> None:
    refused_value(server, user, name, value, file_first=file_first)


@pytest.mark.parametrize(
    "name, value", [("quality", 10), ("quality", 128), ("channels", 0), ("channels", 3)]
)
def test_value_out_of_range_is_refused(server: Server, user: User, name: str, value: int) -> None:
    refused_value(server, user, name, value)


def refused_value(
    server: Server, user: User, name: str, value: object, *, file_first: bool = False
) -> None:
    parts = [*options(**{name: value}), *credentials(user)]
    response = server.send(*([FILE, *parts] if file_first else [*parts, FILE]))
    detail = problem(response, 422)
    assert name in detail and {"quality": "0 to 9", "channels": "1 to 2"}[name] in detail
    assert server.records(user) == 0


def test_option_given_twice_is_refused(server: Server, user: User) -> None:
    response = server.send(*credentials(user), *options(quality=6), *options(quality=6), FILE)
    assert "quality" in problem(response, 422)


def test_overlong_option_is_refused(server: Server, user: User) -> None:
    response = server.send(*credentials(user), *options(quality="0" * 1001), FILE)
    assert "quality" in problem(response, 413)


# Under an Idempotency-Key


def keyed(server: Server, user: User, *parts: bytes) -> str:
    headers = {"Idempotency-Key": "key"}
    return link_of(server.send(*credentials(user), *parts, FILE, headers=headers))


def test_same_options_under_the_same_key_are_the_same_upload(server: Server, user: User) -> None:
    chosen = options(quality=6, channels=1)
    links = {keyed(server, user, *chosen), keyed(server, user, *chosen[::-1])}
    headers = {"Idempotency-Key": "key"}
    links.add(link_of(server.send(FILE, *credentials(user), *chosen, headers=headers)))
    assert len(links) == 1
    assert server.records(user) == 1


@pytest.mark.parametrize("others", [{}, {"quality": 5}, {"quality": 6, "channels": 2}])
@pytest.mark.parametrize("file_first", [False, True])
def test_other_options_under_the_same_key_are_refused(
    server: Server, user: User, others: dict[str, int], file_first: bool
) -> None:
    keyed(server, user, *options(quality=6))
    parts = [*credentials(user), *options(**others), FILE]
    headers = {"Idempotency-Key": "key"}
    response = server.send(*(parts[::-1] if file_first else parts), headers=headers)
    assert "Idempotency-Key" in problem(response, 422)
    assert server.records(user) == 1


@pytest.mark.parametrize("file_first", [False, True])
def test_upload_without_options_has_the_digest_of_its_file(
    server: Server, user: User, file_first: bool
) -> None:
    headers = {"Idempotency-Key": "key"}  # which earlier releases have stored
    link_of(server.upload(user, STEREO, headers=headers, file_first=file_first))
    sql = "SELECT wav_sha256 FROM wav_to_mp3.records WHERE id_user = $1"
    [row] = query(server.database_url, sql, user.id)
    assert row["wav_sha256"] == hashlib.sha256(STEREO).digest()
