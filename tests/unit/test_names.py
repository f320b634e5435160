"""Names of files: what an upload is called, and what its MP3 is saved as."""

import re
from urllib.parse import unquote

import pytest

from service import content_disposition, mp3_name


@pytest.mark.parametrize(
    "filename, expected",
    [
        ("speech.wav", "speech.mp3"),
        ("speech.WAVE", "speech.mp3"),
        ("speech", "speech.mp3"),
        ("speech.wav.wav", "speech.wav.mp3"),
        ("Запись 1.wav", "Запись 1.mp3"),
        ("会议🎤.wav", "会议🎤.mp3"),
        ("👩‍🚀.wav", "👩‍🚀.mp3"),
        ("a \"b\" 'c'.wav", "a \"b\" 'c'.mp3"),
        # of a path the last part
        ("/etc/passwd", "passwd.mp3"),
        ("../../x.wav", "x.mp3"),
        (r"C:\fakepath\x.wav", "x.mp3"),
        (r"a/b\c/x.wav", "x.mp3"),
        # no control characters
        ("a\r\nSet-Cookie: b.wav", "aSet-Cookie: b.mp3"),
        ("a\0b\x1b\x7f\x85.wav", "ab.mp3"),
        ("a\ud800.wav", "a.mp3"),
        # no dots, nor spaces, at either end
        (".hidden.wav", "hidden.mp3"),
        ("x..wav", "x.mp3"),
        (" x . .wav ", "x.mp3"),
        # something in any case
        ("", "recording.mp3"),
        (".", "recording.mp3"),
        ("..", "recording.mp3"),
        ("...wav", "recording.mp3"),
        (".wav", "recording.mp3"),
        ("a/", "recording.mp3"),
        ("\r\n", "recording.mp3"),
        (".\0.", "recording.mp3"),
        # and no more than 255 bytes
        ("x" * 251 + ".wav", "x" * 251 + ".mp3"),
        ("x" * 300 + ".wav", "x" * 251 + ".mp3"),
        ("ы" * 300 + ".wav", "ы" * 125 + ".mp3"),
        ("🎤" * 300 + ".wav", "🎤" * 62 + ".mp3"),
    ],
)
def test_mp3_name(filename: str, expected: str) -> None:
    assert mp3_name(filename) == expected


@pytest.mark.parametrize(
    "filename, ascii_name, encoded",
    [
        ("speech.mp3", "speech.mp3", "speech.mp3"),
        ("a b (1)+,=@~-_.mp3", "a b (1)+,=@~-_.mp3", "a%20b%20%281%29%2B%2C%3D%40~-_.mp3"),
        ("Zoë.mp3", "Zoe.mp3", "Zo%C3%AB.mp3"),
        ("x ы.mp3", "x .mp3", "x%20%D1%8B.mp3"),
        ("ы.mp3", "recording.mp3", "%D1%8B.mp3"),
        ("会.mp3", "recording.mp3", "%E4%BC%9A.mp3"),
        ("🎤.mp3", "recording.mp3", "%F0%9F%8E%A4.mp3"),
        ('a"b.mp3', "a_b.mp3", "a%22b.mp3"),
        ("a\\b.mp3", "a_b.mp3", "a%5Cb.mp3"),
        ("a/b.mp3", "a_b.mp3", "a%2Fb.mp3"),
        ("a\u2100.mp3", "aa_c.mp3", "a%E2%84%80.mp3"),
        ("a;b'c%41*.mp3", "a_b_c_41_.mp3", "a%3Bb%27c%2541%2A.mp3"),
        ("a\r\nb.mp3", "a__b.mp3", "a%0D%0Ab.mp3"),
        ("-o.mp3", "recording.mp3", "-o.mp3"),
        ("..mp3", "recording.mp3", "..mp3"),
        ("\u2024\u2024.mp3", "recording.mp3", "%E2%80%A4%E2%80%A4.mp3"),
    ],
)
def test_content_disposition(filename: str, ascii_name: str, encoded: str) -> None:
    header = f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{encoded}"
    assert content_disposition(filename) == header


def test_content_disposition_is_well_formed_whatever_the_character() -> None:
    pattern = r"attachment; filename=\"\w[\w .()+,=@~-]*\"; filename\*=UTF-8''([\w.~%-]+)"
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x20000)]):
        filename = f"a{character}b.mp3"
        match = re.fullmatch(pattern, content_disposition(filename), re.ASCII)
        assert match, filename
        assert unquote(match[1]) == filename


@pytest.mark.parametrize("character", ["x", "ы", "\u2177", "\u33c2"])
def test_content_disposition_has_no_name_of_over_255_bytes(character: str) -> None:
    header = content_disposition(mp3_name(character * 300))
    match = re.match(r'attachment; filename="([^"]+\.mp3)"', header)
    assert match
    assert len(match[1]) <= 255
