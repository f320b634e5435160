"""How the end of ffmpeg is judged."""

import errno
import signal

import pytest
from starlette.exceptions import HTTPException

from service import EncoderFailure, verdict


@pytest.mark.parametrize(
    "log, samples",
    [
        ("[verbose] 1 decode errors (441 samples)", 441),
        ("0 decode errors (0 samples)\n[info] 9 decode errors (441 samples)\n", 441),
        ("0 decode errors (0 samples)", 0),
        # what is told on the way does not matter
        ("[error] No space left on device\n1 decode errors (441 samples)", 441),
        ("[error] received signal 24\n1 decode errors (441 samples)", 441),
    ],
)
def test_samples_of_an_encoder_that_ended_well(log: str, samples: int) -> None:
    assert verdict(0, log) == samples


@pytest.mark.parametrize(
    "status, log",
    [
        (-signal.SIGXFSZ, ""),
        (-signal.SIGXFSZ, "1 decode errors (441 samples)"),
        (255, f"[fatal] Exiting normally, received signal {signal.SIGXCPU:d}."),
        (69, "15 decode errors (441 samples)\n[info] Conversion failed!"),
    ],
)
def test_encoder_that_failed_by_its_input_has_got_no_recording(status: int, log: str) -> None:
    with pytest.raises(HTTPException) as refused:
        verdict(status, log)
    assert refused.value.status_code == 422


@pytest.mark.parametrize(
    "status, log",
    [
        (0, ""),
        (0, "frames encoded"),
        (1, ""),
        (1, "1 decode errors (441 samples)"),
        (127, "error while loading shared libraries"),
        (255, "Exiting normally, received signal 15."),
        (-signal.SIGKILL, "[error] No space left on device"),
        (-signal.SIGSEGV, ""),
    ],
)
def test_encoder_that_failed(status: int, log: str) -> None:
    with pytest.raises(EncoderFailure):
        verdict(status, log)


def test_encoder_whose_disk_was_full() -> None:
    with pytest.raises(OSError) as full:
        verdict(1, "[error] av_interleaved_write_frame(): No space left on device")
    assert full.value.errno == errno.ENOSPC
