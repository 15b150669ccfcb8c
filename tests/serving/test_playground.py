"""The playground in headless Chromium, and its votes as a preferences dataset."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bridgework.data.dataset import open_dataset
from bridgework.data.importers.preferences import PreferencesImporter
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options
from bridgework.serving.playground import PreferenceRequest, save_preference
from tests.serving.support import ModelHome, ServeChat, picture, url

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 60_000
# a canvas as the camera: Chromium's own fake one ends the browser on a busy machine
CAMERA = """
navigator.mediaDevices.getUserMedia = async () => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    const draw = canvas.getContext("2d");
    setInterval(() => draw.fillRect(0, 0, 64, 64), 20);
    return canvas.captureStream();
};
"""

# An answer that stays incomplete after its first words, until it is stopped
UNFINISHED = """
const fetched = window.fetch;
window.fetch = async (address, options) => {
    const reply = await fetched(address, options);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    const stopped = new Promise((resolve, reject) => {
        options.signal.addEventListener("abort", () => reject(options.signal.reason));
    });
    stopped.catch(() => null);
    const body = new ReadableStream({ async start(held) {
        for (let text = ""; !/"content": ?"[^"]/.test(text);) {
            const { value } = await reader.read();
            text += value;
            held.enqueue(new TextEncoder().encode(value.replace("data: [DONE]", "")));
        }
        stopped.catch((reason) => held.error(reason));
    } });
    return new Response(body, { status: reply.status });
};
"""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@contextmanager
def browsing() -> Iterator[Browser]:
    """Open Chromium for the block. Playwright holds the thread's event loop until its end."""
    with sync_playwright() as playwright:
        # the sandbox needs privileges that CI may not give
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser: Browser, address: str, **context: Any) -> Page:
    """Open the playground; an error of its script fails the test."""
    page = browser.new_page(**context)
    page.set_default_timeout(WAIT_MS)
    page.add_init_script(CAMERA)
    page.on("pageerror", lambda error: pytest.fail(f"the page's script failed: {error}"))
    page.goto(f"{address}/")
    expect(page.locator("#model option")).not_to_have_count(0, timeout=WAIT_MS)
    page.evaluate("document.getElementById('tokens').value = 12")
    page.evaluate("document.getElementById('temperature').value = 0")  # the same answer each time
    return page


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Send").click()


@needs_chromium
def test_question_is_answered_compared_voted_and_traced(
    serve_chat: ServeChat, model_home: ModelHome, tmp_path: Path
) -> None:
    images = [tmp_path / name for name in ("red.png", "blue.png")]
    for file in images:
        file.write_bytes(picture(file.stem))
    with serve_chat(model_home.path, challenger="m:3") as http, browsing() as browser:
        page = visit(browser, str(http.base_url).rstrip("/"))
        # two images, one answer
        page.locator("#file").set_input_files(images)
        expect(page.locator("#thumbs img")).to_have_count(2)
        ask(page, "What is it?")
        expect(page.locator(".user img")).to_have_count(2)
        expect(page.locator(".assistant .note")).to_contain_text("tokens/s", timeout=WAIT_MS)
        expect(page.locator(".assistant .note")).to_contain_text("first after")
        assert page.locator(".assistant > span").inner_text()
        expect(page.locator("#status")).not_to_be_empty()  # what a screen reader says
        # the trace of the answer
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#tree")).to_contain_text("deployment", timeout=WAIT_MS)
        expect(page.locator("#tree")).to_contain_text("model m  version 1")
        page.get_by_role("button", name="Back to the conversation").click()
        # champion and challenger on the same question, and a vote
        page.get_by_role("button", name="Clear").click()
        page.locator("#file").set_input_files(images[:1])
        page.get_by_label("Compare with", exact=True).check()
        ask(page, "And this?")
        expect(page.locator(".assistant .note")).to_have_count(2, timeout=WAIT_MS)
        assert page.locator(".assistant h2").all_inner_texts() == ["Answer A", "Answer B"]
        page.get_by_role("button", name="B is better").click()
        expect(page.locator(".votes")).to_contain_text("The vote is saved.", timeout=WAIT_MS)
        assert sorted(t[-3:] for t in page.locator(".assistant h2").all_inner_texts()) == [
            "m:1",
            "m:3",
        ]
        page.close()
    votes = model_home.path / "preferences" / "votes.jsonl"
    (row,) = [json.loads(line) for line in votes.read_text().splitlines()]
    assert row["chosen"] != row["rejected"]
    imported = tmp_path / "imported"
    PreferencesImporter().run(str(votes), str(imported))
    (sample,) = open_dataset(str(imported)).samples()
    assert sample.images == (images[0].read_bytes(),)
    assert sample.rejected == row["rejected"].strip()


@needs_chromium
def test_keyboard_camera_stop_and_narrow_dark_pages_work(
    serve_chat: ServeChat, model_home: ModelHome
) -> None:
    with serve_chat(model_home.path) as http, browsing() as browser:
        narrow: Any = {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"}
        page = visit(browser, str(http.base_url).rstrip("/"), **narrow)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(n) for n in dark[4:-1].split(",")) < 64
        # every control has a name
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea')]"
            ".filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))"
            ".map((e) => e.id)"
        )
        assert unnamed == []
        # the camera
        page.get_by_role("button", name="Camera").click()
        page.wait_for_function("document.getElementById('video').videoWidth > 0")
        page.get_by_role("button", name="Take picture").click()
        expect(page.locator("#thumbs img")).to_have_count(1)
        # an image is removed and a question sent with the keyboard alone
        page.get_by_role("button", name="remove it").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#thumbs img")).to_have_count(0)
        page.keyboard.type("What?")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant .note")).to_have_count(1, timeout=WAIT_MS)
        # a long answer is stopped
        page.evaluate(UNFINISHED)
        page.keyboard.type("Again?")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant > span").last).not_to_be_empty(timeout=WAIT_MS)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".assistant .note").last).to_contain_text("Stopped.")
        # an image is pasted
        page.evaluate(
            """async (url) => {
                const data = new DataTransfer();
                const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
                data.items.add(new File([bytes], "a.png", { type: "image/png" }));
                dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
            }""",
            url(picture()),
        )
        expect(page.locator("#thumbs img")).to_have_count(1)
        page.close()


def request(
    chosen: str = "a circle", rejected: str = "noise", text: str = "What?"
) -> PreferenceRequest:
    image = {"type": "image_url", "image_url": {"url": url(picture())}}
    turn = {"role": "user", "content": [image, {"type": "text", "text": text}]}
    answers = {"chosen": chosen, "rejected": rejected}
    rated = {
        key: {"id": f"chatcmpl-{'0' * 12}-{'1' * 12}", "text": answers[key]} for key in answers
    }
    return PreferenceRequest.model_validate({"model": "m", "messages": [turn], **rated})


def test_votes_of_a_conversation_are_imported_with_shared_images(tmp_path: Path) -> None:
    options = Options(model="m", home=str(tmp_path))
    system = {"role": "system", "content": "Be brief."}
    again = [
        *request().model_dump()["messages"],
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "Which color?"},
    ]
    longer = request().model_dump() | {"messages": [system, *again]}
    ids = [
        save_preference(body, options)["id"]
        for body in (request(), PreferenceRequest.model_validate(longer))
    ]
    assert len(list((tmp_path / "preferences").glob("*.png"))) == 1
    PreferencesImporter().run(
        str(tmp_path / "preferences" / "votes.jsonl"), str(tmp_path / "votes")
    )
    samples = list(open_dataset(str(tmp_path / "votes")).samples())
    assert [sample.key for sample in samples] == ids
    assert [part.role for part in samples[1].parts if part.text != "\n"][:2] == ["system", "user"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (request("same", "same"), "invalid_value"),
        (request("", "noise"), "invalid_value"),
        (request("<image>", "noise"), "invalid_value"),
        (request(text="<image> what?"), "invalid_value"),
        (request("x" * 70_000), "text_too_long"),
    ],
    ids=["equal", "empty", "placeholder in an answer", "placeholder in a question", "long"],
)
def test_vote_that_could_not_be_imported_is_rejected_and_leaves_nothing(
    body: PreferenceRequest, code: str, tmp_path: Path
) -> None:
    with pytest.raises(APIError) as caught:
        save_preference(body, Options(model="m", home=str(tmp_path)))
    assert (caught.value.status, caught.value.code) == (400, code)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"]


def test_votes_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(APIError, match="larger votes_bytes") as caught:
        save_preference(request(), Options(model="m", home=str(tmp_path), votes_bytes=100))
    assert caught.value.status == 507


def test_votes_and_traces_need_a_valid_request(
    serve_chat: ServeChat, model_home: ModelHome
) -> None:
    with serve_chat(model_home.path) as http:
        vote: httpx.Response = http.post("/v1/preferences", json={"model": "m", "messages": []})
        assert (vote.status_code, vote.json()["error"]["code"]) == (400, "invalid_value")
        for path in ("m", "chatcmpl-0123456789ab-0123456789ab"):
            reply = http.get(f"/v1/trace/{path}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
