"""The page, in a real browser."""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Dialog, Page, expect

from browser import (
    CHROMIUM,
    Browser,
    choose,
    chromium,
    drop,
    register,
    sign_in,
    throttle,
)
from hosts import Host, in_uvicorn
from proxy import Proxy
from store import store, store_many
from support import Postgres, Server, StartServer, User, problem, query, wait_for
from wav import LONG, SPEECH, decoded, noise
from wire import Sending, link_of, working

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)

REFUSED = "the server responded with a status of"


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
def browser(address: str) -> Iterator[Browser]:
    with Browser(address) as browser:
        yield browser


@pytest.fixture
def page(server: Server, user: User, browser: Browser) -> Page:
    """The page of a user without recordings."""
    page = browser.open(server.url)
    sign_in(page, user)
    return page


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    path.write_bytes(SPEECH)
    return path


@pytest.fixture(scope="module")
def recording(server: Server) -> tuple[User, str]:
    """A user with a recording of a minute, and its link."""
    user = server.register()
    return user, link_of(server.upload(user, LONG, "rain.wav"))


# Whether the waveform is there, and reaches into the upper quarter of its place.
LOUD = """async () => {
    const [, source] = /"(.+)"/.exec(document.querySelector("[type=range]").style.mask) ?? [];
    if (!source) return false;
    const image = Object.assign(new Image(), {src: source});
    await image.decode();
    const copy = new OffscreenCanvas(image.width, image.height).getContext("2d");
    copy.drawImage(image, 0, 0);
    return copy.getImageData(0, 0, image.width, image.height / 4).data.some(value => value > 0);
}"""


def name() -> str:
    return f"Ada {uuid.uuid4().hex[:8]}"


def stored(page: Page) -> User:
    """The account that the browser keeps."""
    (account,) = map(json.loads, page.evaluate("Object.values(localStorage)"))
    return User(account["id"], account["token"])


def kept(server: Server, user: User) -> list[str]:
    """The names of the recordings that the service keeps."""
    headers = {"Authorization": f"Bearer {user.token}"}
    listing = server.http.get("/api/records", params={"id_user": user.id}, headers=headers)
    return [record["filename"] for record in listing.json()["records"]]


def agree(page: Page) -> None:
    """Say yes from now on when the page asks; else the answer is no."""
    page.on("dialog", lambda dialog: dialog.accept())


def play(page: Page) -> None:
    page.get_by_role("button", name="Play").click()
    wait_for(lambda: position(page))


def position(page: Page) -> float:
    return float(page.evaluate("document.querySelector('audio').currentTime"))


# Account


@pytest.mark.slow
def test_first_visit_leads_to_recordings_that_are_there_again_after_a_reload(
    server: Server, browser: Browser, tmp_path: Path
) -> None:
    files = [tmp_path / f"take {number}.wav" for number in (1, 2, 3)]
    for file in files:
        file.write_bytes(SPEECH)
    page = browser.open(server.url)
    me = name()
    register(page, me)
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    drop(page, *files)
    expected = ["take 3.mp3", "take 2.mp3", "take 1.mp3"]
    expect(page.locator("#recordings .name")).to_have_text(expected)
    expect(page.get_by_role("heading", name="Uploads")).to_be_hidden()
    assert kept(server, stored(page)) == expected
    page.reload()
    expect(page.locator("#recordings .name")).to_have_text(expected)
    expect(page.get_by_role("button", name=me)).to_be_visible()


def test_files_dropped_before_there_is_a_name_are_uploaded_afterwards(
    server: Server, browser: Browser, speech: Path
) -> None:
    page = browser.open(server.url)
    drop(page, speech)
    expect(page.get_by_text("Waiting for your name", exact=True)).to_be_visible()
    register(page, name())
    expect(page.locator("#recordings .name")).to_have_text(["speech.mp3"])


def test_taken_name_is_refused_with_the_sentence_of_the_service(
    server: Server, browser: Browser
) -> None:
    me = {"username": name()}
    server.http.post("/api/registration/", json=me)
    sentence = problem(server.http.post("/api/registration/", json=me), 409)
    page = browser.open(server.url)
    page.get_by_label("Your name").fill(me["username"])
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert").first).to_have_text(sentence)
    browser.expect(f"{REFUSED} 409")


def test_registration_key_is_asked_for_where_there_is_one(
    start_server: StartServer, browser: Browser
) -> None:
    page = browser.open(start_server(REGISTRATION_KEY="sesame").url)
    key = page.get_by_label("Registration key")
    expect(key).to_be_hidden()
    page.get_by_label("Your name").fill("Ali")
    page.get_by_role("button", name="Start").click()
    key.fill("sesame")
    register(page, "Ali")
    browser.expect(f"{REFUSED} 401")


def test_token_is_shown_copied_and_renewed(
    server: Server, page: Page, user: User, speech: Path
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page, speech)
    recording = page.wait_for_selector(".recording")
    assert recording
    page.get_by_role("button", name="User").click()
    account = page.get_by_role("dialog")
    expect(account.get_by_text(user.token)).to_be_hidden()
    account.get_by_text("Show token").click()
    expect(account.get_by_text(user.token)).to_be_visible()
    account.get_by_role("button", name="Renew token").click()
    expect(page.get_by_text("This is a new token.")).to_be_visible()
    expect(account.get_by_text(user.token)).to_be_hidden()
    account.get_by_role("button", name="Copy token").click()
    expect(page.get_by_text("Token copied.")).to_be_visible()
    token = page.evaluate("navigator.clipboard.readText()")
    assert token == stored(page).token != user.token
    assert kept(server, User(user.id, token)) == ["speech.mp3"]
    assert recording.evaluate("node => node.isConnected"), "what plays would have stopped"


def test_token_that_was_renewed_elsewhere_is_asked_for(
    server: Server, page: Page, user: User, browser: Browser
) -> None:
    headers = {"Authorization": f"Bearer {user.token}"}
    token = server.http.post("/api/token/", headers=headers).json()["user_token"]
    page.reload()
    expect(page.get_by_text("The credentials are wrong")).to_be_visible()
    sign_in(page, User(user.id, token))
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    assert stored(page).token == token
    browser.expect(f"{REFUSED} 401")


def test_signing_out_asks_and_leaves_nothing(page: Page) -> None:
    page.get_by_role("button", name="User").click()
    page.get_by_role("button", name="Sign out").click()
    assert page.evaluate("localStorage.length") == 1
    agree(page)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Your name")).to_be_focused()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0


def test_deleting_the_account_asks_and_deletes_it(server: Server, page: Page, user: User) -> None:
    page.get_by_role("button", name="User").click()
    page.get_by_role("button", name="Delete account").click()
    assert kept(server, user) == []
    agree(page)
    page.get_by_role("button", name="Delete account").click()
    expect(page.get_by_label("Your name")).to_be_visible()
    headers = {"Authorization": f"Bearer {user.token}"}
    problem(server.http.get(f"/api/records?id_user={user.id}", headers=headers), 401)


# Uploads


@pytest.mark.slow
def test_upload_shows_how_it_goes_and_is_cancelled(
    server: Server, page: Page, user: User, speech: Path
) -> None:
    long = speech.with_name("long.wav")
    long.write_bytes(noise(8_000_000))
    throttle(page, 1_000_000)
    choose(page, long, speech)
    going = re.compile(r"^\d+% · [\d.]+ [kM]B of 8 MB · [\d.]+ [kM]B/s · 0:0\d left$")
    expect(page.get_by_text(going)).to_be_visible()
    bar = page.get_by_role("progressbar", name="Upload of long.wav")
    share = bar.evaluate("bar => bar.value")
    assert 0 < share < 1
    wait_for(lambda: bar.evaluate("bar => bar.value") > share)
    heard = page.get_by_role("status").get_by_text(re.compile(r"^long\.wav: \d+% · "))
    expect(heard).to_be_attached()
    with page.expect_event("dialog") as leaving:
        page.close(run_before_unload=True)
    assert leaving.value.type == "beforeunload"
    leaving.value.dismiss()
    page.get_by_role("button", name="Cancel").first.click()
    expect(page.locator("#recordings .name")).to_have_text(["speech.mp3"])
    expect(page.get_by_role("heading", name="Uploads")).to_be_hidden()
    assert kept(server, user) == ["speech.mp3"]


def test_file_that_is_no_wav_stands_with_the_sentence_of_the_service(
    server: Server, page: Page, user: User, browser: Browser, speech: Path
) -> None:
    photo = speech.with_name("photo.wav")
    photo.write_bytes(b"\xff\xd8\xff\xe0" * 1000)
    sentence = problem(server.upload(user, photo.read_bytes()), 422)
    drop(page, photo, speech)
    expect(page.locator("#recordings .name")).to_have_text(["speech.mp3"])
    expect(page.get_by_role("listitem").filter(has_text="photo.wav")).to_contain_text(sentence)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_role("heading", name="Uploads")).to_be_hidden()
    browser.expect(f"{REFUSED} 422")


def test_upload_goes_on_when_the_network_is_back(
    page: Page, browser: Browser, speech: Path
) -> None:
    page.context.set_offline(True)
    expect(page.get_by_text("You are offline")).to_be_visible()
    choose(page, speech)
    paused = "Check the connection. Trying again in 0:0"
    expect(page.get_by_role("listitem").get_by_text(paused)).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#recordings .name")).to_have_text(["speech.mp3"])
    expect(page.get_by_text("You are offline")).to_be_hidden()
    browser.expect("net::ERR_INTERNET_DISCONNECTED")


def test_upload_whose_answer_is_lost_is_stored_once(
    server: Server, user: User, browser: Browser, speech: Path
) -> None:
    address = server.http.base_url
    with Proxy((address.host, address.port or 80)) as proxy:
        page = browser.open(f"http://127.0.0.1:{proxy.port}")
        sign_in(page, user)
        proxy.cut_at = b"201 Created"
        choose(page, speech)
        expect(page.locator("#recordings .name")).to_have_text(["speech.mp3"])
        assert proxy.cut_at is None
        assert kept(server, user) == ["speech.mp3"]
        page.context.close()
    browser.console.clear()  # Chromium repeats some requests itself, and says nothing then


@pytest.mark.slow
def test_busy_service_is_asked_again_when_it_says(
    start_server: StartServer, browser: Browser, speech: Path
) -> None:
    server = start_server(MAX_ENCODERS="1", QUEUE_SECONDS="0")
    user = server.register()
    with Sending(server, user, LONG) as other:
        other.share(0.5)
        wait_for(lambda: working(server))
        page = browser.open(server.url)
        sign_in(page, user)
        choose(page, speech)
        paused = page.get_by_role("listitem").get_by_text("Trying again in 0:0")
        expect(paused).to_be_visible()
        other.finish()
    expect(page.locator("#recordings .name")).to_have_text(["speech.mp3", "speech.mp3"])
    browser.expect(f"{REFUSED} 503")


@pytest.mark.parametrize("quality, channels", [("Music", 2), ("Speech", 1), ("Smallest", 1)])
def test_quality_is_chosen(
    server: Server, page: Page, user: User, speech: Path, quality: str, channels: int
) -> None:
    speech.write_bytes(noise(400_000))
    page.get_by_label(quality).check()
    choose(page, speech)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert decoded(download.value.path().read_bytes()).channels == channels


def test_file_is_pasted(page: Page) -> None:
    page.evaluate(
        """wav => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(wav)], "pasted.wav"));
            dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
        }""",
        list(SPEECH),
    )
    expect(page.locator("#recordings .name")).to_have_text(["pasted.mp3"])


def test_names_are_text(page: Page, speech: Path) -> None:
    name = "<img src=x onerror=alert(1)>.wav"
    choose(page, speech.rename(speech.with_name(name)))
    expect(page.locator("#recordings .name")).to_have_text([name.replace(".wav", ".mp3")])


# Recordings


def test_recording_plays_under_its_waveform_where_it_is_clicked(
    server: Server, browser: Browser, recording: tuple[User, str]
) -> None:
    user, _ = recording
    page = browser.open(server.url)
    sign_in(page, user)
    statuses: list[int] = []
    page.on("response", lambda answer: statuses.append(answer.status))
    play(page)
    assert 206 in statuses
    wait_for(lambda: page.evaluate(LOUD))
    slider = page.get_by_role("slider", name="Position in rain.mp3")
    box = slider.bounding_box()
    assert box
    slider.click(position={"x": box["width"] * 0.75, "y": 5})
    length = len(LONG) / 176400
    wait_for(lambda: position(page) > 0.7 * length)
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"^0:4\d of 0:57$"))
    page.keyboard.press("Home")
    wait_for(lambda: position(page) < 0.5 * length)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_recording_of_an_hour_is_not_decoded(server: Server, user: User, browser: Browser) -> None:
    link_of(server.upload(user, SPEECH))
    query(
        server.database_url,
        "UPDATE wav_to_mp3.records SET duration = 3600 WHERE id_user = $1",
        user.id,
    )
    page = browser.open(server.url)
    sign_in(page, user)
    expect(page.locator(".recording")).to_have_count(1)
    wanted: list[str] = []
    page.on("request", lambda request: wanted.append(request.resource_type))
    play(page)
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert set(wanted) == {"media"}


def test_recording_that_could_not_be_played_is_played_when_the_network_is_back(
    server: Server, browser: Browser, recording: tuple[User, str]
) -> None:
    user, _ = recording
    page = browser.open(server.url)
    sign_in(page, user)
    page.context.set_offline(True)
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_text("rain.mp3 cannot be played")).to_be_visible()
    page.context.set_offline(False)
    play(page)
    wait_for(lambda: page.evaluate(LOUD))
    browser.expect("net::ERR_INTERNET_DISCONNECTED")


def test_link_is_copied_and_leads_to_what_is_downloaded(
    server: Server, browser: Browser, recording: tuple[User, str]
) -> None:
    user, link = recording
    page = browser.open(server.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    sign_in(page, user)
    page.get_by_role("button", name="Copy link: rain.mp3").click()
    expect(page.get_by_text("Link copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == link
    with page.expect_download() as download:
        page.get_by_role("link", name="Download: rain.mp3").click()
    assert download.value.suggested_filename == "rain.mp3"
    assert download.value.path().read_bytes() == server.http.get(link).content


def test_deleting_asks_and_deletes(server: Server, page: Page, user: User, speech: Path) -> None:
    choose(page, speech)
    page.get_by_role("button", name="Delete: speech.mp3").click()
    assert kept(server, user) == ["speech.mp3"]
    agree(page)
    page.get_by_role("button", name="Delete: speech.mp3").click()
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    assert kept(server, user) == []


def test_older_recordings_come_on_demand(server: Server, user: User, browser: Browser) -> None:
    now = datetime.now(UTC)
    store_many(server, user, [now - timedelta(minutes=minutes) for minutes in range(45)])
    page = browser.open(server.url)
    sign_in(page, user)
    for shown in (20, 40, 45):
        expect(page.locator(".recording")).to_have_count(shown)
        if shown < 45:
            page.get_by_role("button", name="Show more").click()
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    minutes = page.locator(".recording [data-part=about]").all_inner_texts()
    assert len(set(minutes)) == 45


@pytest.mark.slow
def test_listing_that_cannot_be_read_says_so_and_is_read_again(
    service: Server,
    database: Postgres,
    outage: Callable[[str], None],
    browser: Browser,
) -> None:
    page = browser.open(service.url)
    register(page, name())
    outage("fast")
    page.reload()
    expect(page.get_by_text("The database or the disk is out of order")).to_be_visible()
    database.start()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    browser.expect(f"{REFUSED} 503")


def test_recording_that_expires_says_when(start_server: StartServer, browser: Browser) -> None:
    server = start_server(KEEP_DAYS="1")
    user = server.register()
    link_of(server.upload(user, SPEECH))
    page = browser.open(server.url)
    sign_in(page, user)
    about = re.compile(r"^0:00 · .* · until [A-Z][a-z]{2} \d+, \d{4}, ")
    expect(page.locator(".recording [data-part=about]")).to_have_text(about)


def test_numbers_and_dates_are_in_the_manner_of_the_reader(
    server: Server, browser: Browser, recording: tuple[User, str]
) -> None:
    user, _ = recording
    page = browser.open(server.url, locale="de-DE")
    sign_in(page, user)
    today = datetime.now(UTC).strftime("%d.%m.%Y")
    pattern = rf"^0:57 · \d,\d+ MB · {today}, \d\d:\d\d$"
    expect(page.locator(".recording .numbers").first).to_have_text(re.compile(pattern))


# Where and how it is opened


def tab_to(page: Page, label: str) -> None:
    """Go on with the keyboard to what has this label."""
    focused = "document.activeElement.ariaLabel ?? document.activeElement.innerText"
    for _ in range(20):
        page.keyboard.press("Tab")
        if str(page.evaluate(focused)).startswith(label):
            return
    raise AssertionError(f"the keyboard does not lead to {label}")


def test_all_of_it_works_from_the_keyboard(server: Server, browser: Browser, speech: Path) -> None:
    page = browser.open(server.url)
    page.on("filechooser", lambda chooser: chooser.set_files(speech))
    page.keyboard.type(name())
    page.keyboard.press("Enter")
    expect(page.get_by_label("Choose files")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".recording")).to_have_count(1)
    tab_to(page, "Play")
    page.keyboard.press("Enter")
    wait_for(lambda: position(page))
    agree(page)
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    expect(page.get_by_role("heading", name="Recordings")).to_be_focused()


@pytest.fixture(scope="module")
def host(postgres: Postgres) -> Iterator[Host]:
    """An application that has the service at /audio, and sends nobody on to /audio/."""
    with Host({"DATABASE_URL": postgres.create_database()}, in_uvicorn("litestar")) as host:
        assert host.url
        yield host


@pytest.mark.parametrize("path", ["/audio", "/audio/"])
def test_works_at_the_path_of_a_mount(
    host: Host, browser: Browser, speech: Path, path: str
) -> None:
    page = browser.open(host.url + path)
    assert page.url == host.url + path
    register(page, name())
    choose(page, speech)
    play(page)
    link = page.get_by_role("link", name="Download").get_attribute("href")
    assert link and link.startswith(f"{host.url}/audio/api/download?")


def test_works_over_plain_http_from_another_machine(
    server: Server, browser: Browser, speech: Path
) -> None:
    page = browser.open(server.url.replace("127.0.0.1", "plain.test"))
    assert not page.evaluate("isSecureContext")
    register(page, name())
    choose(page, speech)
    shown: list[str] = []

    def answer(dialog: Dialog) -> None:
        shown.append(dialog.default_value)
        dialog.accept()

    page.on("dialog", answer)
    page.get_by_role("button", name="Copy link").click()
    wait_for(lambda: shown)
    assert shown[0].startswith("http://plain.test:")
    play(page)


def test_without_javascript_it_shows_the_lines_for_curl(server: Server, browser: Browser) -> None:
    page = browser.open(server.url, java_script_enabled=False)
    lines = page.locator("noscript pre")
    expect(lines).to_be_visible()
    for path in ("registration/", "upload_audiorecord/", "records?id_user=ID"):
        expect(lines).to_contain_text(f"/api/{path}")


def check(page: Page) -> None:
    """Nobody is kept from what is shown now, and nothing is cut off."""
    assert Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_is_accessible_and_fits_a_phone(
    server: Server, browser: Browser, user: User, speech: Path, scheme: str
) -> None:
    store(server, user, filename="a name without a place to break it " + "o" * 200 + ".mp3")
    viewport = {"width": 320, "height": 640}
    page = browser.open(server.url, viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_text("Use an existing account").click()
    check(page)
    page.get_by_text("Use an existing account").click()
    sign_in(page, user)
    speech.with_name("broken.wav").write_bytes(b"RIFF")
    choose(page, speech, speech.with_name("broken.wav"))
    expect(page.get_by_role("button", name="Dismiss")).to_be_visible()
    page.get_by_role("button", name="Play speech").click()
    expect(page.get_by_role("slider")).to_be_visible()
    check(page)
    page.get_by_role("button", name="User").click()
    check(page)
    browser.expect(f"{REFUSED} 422")
