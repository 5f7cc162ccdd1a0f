"""The page, in a real Chromium: against a service without models, which answers as the real one does, and against the real one.

pip install -e '.[test,test-browser]'; apt-get install chromium; pytest -m browser -n 0. Pictures go to JAXMODELS_SCREENSHOTS, if it is set.
"""

import base64
import contextlib
import os
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import served_runs
from PIL import Image

from jaxmodels.serving.engines import make_engine

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install -e '.[test-browser]'")
import fake_service  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
expect = sync_api.expect
LOOKS = {"wide_light": (1200, 800, "light"), "wide_dark": (1200, 800, "dark"), "phone_light": (360, 740, "light"), "phone_dark": (360, 740, "dark")}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # a sandbox needs rights that containers lack
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running():
    service = fake_service.FakeService()
    with fake_service.serve(service.app) as address:
        yield service, address


@pytest.fixture
def service(running):
    service = running[0]
    service.seen.clear()
    service.left, service.key, service.loading = 0, None, False
    return service


class Visit:
    """A visit of the page; at its end, no request has left the host, and the console has no errors but those that were expected."""

    def __init__(self, page, address, folder):
        self.page, self.address, self.folder, self.errors, self.allowed = page, address, folder, [], ()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(address) or self.errors.append(f"left the host: {request.url}"))

    def open(self, model):
        self.page.goto(f"{self.address}#{model}")
        expect(self.page.get_by_role("combobox", name="Model")).to_have_value(model)

    def picture(self, name):
        width = self.page.viewport_size["width"]
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        self.page.screenshot(path=self.folder / f"{name}.png", full_page="forecast" in name)


@contextlib.contextmanager
def visiting(browser, address, folder, look="wide_light"):
    width, height, theme = LOOKS[look]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce")
    visit = Visit(context.new_page(), address, folder)
    yield visit
    context.close()
    assert [error for error in visit.errors if not any(part in error for part in visit.allowed)] == []


@pytest.fixture
def folder(tmp_path):
    """The folder of pictures."""
    folder = Path(os.environ.get("JAXMODELS_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(request, browser, running, service, folder):
    """The page of the fake service, by default at the first of the looks."""
    with visiting(browser, running[1], folder, getattr(request, "param", "wide_light")) as visit:
        yield visit


every_look = pytest.mark.parametrize("visit", LOOKS, indirect=True)


@every_look
def test_a_chat_streams_and_goes_on(visit, service, request):
    page = visit.page
    visit.open("chat")
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    visit.picture(f"settings-{request.node.callspec.id}")
    page.get_by_text("Settings").click()
    message = page.get_by_label("Message")
    message.fill("A story, please.")
    message.press("Shift+Enter")
    message.press_sequentially("A short one.")
    message.press("Enter")
    answers = page.locator("article.model p")
    expect(answers).to_have_text(re.compile("^Once a"))
    expect(answers).to_have_text(fake_service.STORY, use_inner_text=True)  # as text: its markup made no elements
    assert page.locator("article b, article img").count() == 0
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
    expect(page.locator("article.model small")).to_contain_text("tokens")
    expect(page.locator("article.model small")).to_contain_text("cut at the limit")
    expect(message).to_have_value("")
    assert service.seen[0] == {
        "model": "chat",
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": 256,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A story, please.\nA short one."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    message.fill("Another.")
    page.get_by_role("button", name="Send").click()
    expect(answers).to_have_text([fake_service.STORY] * 2, use_inner_text=True)
    assert [each["role"] for each in service.seen[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert service.seen[1]["messages"][2]["content"] == fake_service.STORY
    bottoms = page.evaluate(
        "[document.querySelector('article:last-child').getBoundingClientRect().bottom, document.getElementById('form').getBoundingClientRect().top]"
    )
    assert bottoms[0] <= bottoms[1], "the end of the answer is behind the form"
    visit.picture(f"chat-{request.node.callspec.id}")
    page.get_by_role("button", name="New").click()
    assert page.locator("article").count() == 0


@pytest.mark.parametrize("way", ["button", "escape", "model"])
def test_a_stream_is_stopped(visit, service, way):
    page = visit.page
    visit.open("chat")
    page.get_by_label("Message").fill("Go on for ever.")
    page.get_by_label("Message").press("Enter")
    expect(page.locator("article.model p")).to_contain_text("on and on and")
    stop = page.get_by_role("button", name="Stop")
    if way == "button":
        stop.focus()
        stop.press("Enter")
    elif way == "escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("combobox", name="Model").select_option("gpt_text")
    expect(stop).to_be_hidden()
    page.wait_for_function("document.activeElement.id !== 'stop'")
    for _ in range(200):
        if service.left:
            break
        page.wait_for_timeout(20)
    assert service.left == 1, "the service was not told"
    if way == "model":
        assert page.locator("article").count() == 0
        return
    expect(page.locator("article.model small")).to_contain_text("stopped")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    page.get_by_label("Message").fill("Short.")
    page.get_by_label("Message").press("Enter")
    expect(page.locator("article.model p").nth(1)).to_contain_text("nothing happened")
    assert service.seen[1]["messages"][1]["content"].startswith("on and on")


@every_look
def test_a_completion_goes_on_from_its_prompt(visit, service, request):
    page = visit.page
    visit.open("gpt_text")
    page.get_by_label("Text to continue").fill("It was late. ")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("article.model p")).to_have_text("It was late. " + fake_service.STORY, use_inner_text=True)
    assert service.seen[0]["prompt"] == "It was late. " and "messages" not in service.seen[0]
    visit.picture(f"completion-{request.node.callspec.id}")


def test_a_source_gives_its_target(visit, service):
    visit.open("dates")
    visit.page.get_by_label("Source text").fill("31 March 2004")
    visit.page.get_by_label("Source text").press("Enter")
    expect(visit.page.locator("article.you p")).to_have_text("31 March 2004")
    expect(visit.page.locator("article.model p")).to_contain_text("Once a model")


@pytest.mark.parametrize("asked, told, left", [("refuse", "The queue is full: 64 requests wait. Try again in 2 s.", 0), ("break", "The engine has ended.", 1)])
def test_an_error_is_told_as_the_service_says_it(visit, service, asked, told, left):
    page = visit.page
    visit.allowed = ("429",)
    visit.open("chat")
    page.get_by_label("Message").fill(f"Please {asked}.")
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("alert")).to_have_text(told)
    assert page.locator("article.model").count() == left
    if not left:
        expect(page.get_by_label("Message")).to_have_value(f"Please {asked}.")
    page.get_by_label("Message").fill("Again.")
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("article.model p").last).to_contain_text("nothing happened")


def test_a_key_is_asked_for_and_kept_for_the_session(visit, service):
    page = visit.page
    visit.allowed = ("401",)
    service.key = "secret"
    page.goto(visit.address)
    expect(page.get_by_role("alert")).to_have_text("This service needs an API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("combobox", name="Model")).to_be_enabled()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("combobox", name="Model")).to_be_enabled()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.getItem('key')]") == [0, "", "secret"]


def test_models_that_are_being_loaded_are_waited_for(visit, service):
    service.loading = True
    visit.page.goto(visit.address)
    expect(visit.page.get_by_text("The models are being loaded")).to_be_visible()
    service.loading = False
    expect(visit.page.get_by_label("Message")).to_be_visible()


@every_look
def test_an_image_is_classified(visit, service, request, tmp_path):
    page = visit.page
    colours = np.linspace(20, 200, 96, dtype=np.uint8)
    image = np.stack([np.tile(colours // 2, (64, 1)), np.tile(colours, (64, 1)), np.full((64, 96), 220, np.uint8)], axis=-1)
    Image.fromarray(image).save(tmp_path / "sea.png")
    visit.open("cifar10")
    page.locator("#file").set_input_files(tmp_path / "sea.png")
    expect(page.locator(".bars li")).to_have_text(["ship93 %", "truck4.1 %", "frog< 0.1 %"])
    assert page.locator(".bars i").first.evaluate("bar => bar.clientWidth / bar.parentElement.clientWidth") == pytest.approx(0.93, abs=0.01)
    expect(page.get_by_label("The chosen image")).to_be_visible()
    visit.picture(f"image-{request.node.callspec.id}")
    red = image[..., ::-1].tobytes()
    drop = """([rows, columns, bytes]) => {
      const canvas = Object.assign(document.createElement('canvas'), {width: columns, height: rows});
      const data = canvas.getContext('2d').createImageData(columns, rows);
      for (let i = 0; i < rows * columns; i++) data.data.set([bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2], 255], 4 * i);
      canvas.getContext('2d').putImageData(data, 0, 0);
      canvas.toBlob((blob) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], 'red.png', {type: 'image/png'}));
        for (const name of ['dragover', 'drop'])
          document.getElementById('drop').dispatchEvent(new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
      });
    }"""
    page.evaluate(drop, [64, 96, list(red)])
    expect(page.locator(".bars li").first).to_have_text("truck93 %")


@every_look
def test_spans_are_coloured(visit, service, request):
    page = visit.page
    visit.open("tagger")
    text = "🎼 Ada Lovelace of London wrote on the numbers of Bernoulli, and the Royal Society read it <i>late</i>."
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Text", exact=True).press("Enter")
    marks = page.locator("mark")
    expect(marks).to_have_text(["Ada LovelacePER", "LondonLOC", "BernoulliPER", "Royal SocietyORG"])
    colours = marks.evaluate_all("all => all.map((mark) => getComputedStyle(mark).backgroundColor)")
    assert colours[0] == colours[2] and len(set(colours)) == 3 and "rgba(0, 0, 0, 0)" not in colours
    expect(page.get_by_label("Legend").locator("li")).to_have_text(["LOC (1)", "ORG (1)", "PER (2)"])
    assert page.locator(".tagged").evaluate("all => all.textContent").replace("PER", "").replace("LOC", "").replace("ORG", "") == text
    visit.picture(f"spans-{request.node.callspec.id}")


def test_texts_get_a_class_and_pairs_a_number(visit, service):
    page = visit.page
    visit.open("sst2")
    page.get_by_label("Text", exact=True).fill("A quiet, lovely film.")
    page.get_by_label("Text", exact=True).press("Enter")
    expect(page.locator(".bars li").first).to_have_text("positive75 %")
    page.get_by_role("combobox", name="Model").select_option("similar")
    page.get_by_label("First text").fill("A cat.")
    page.get_by_label("Second text").fill("A cat.")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".number")).to_have_text("4.25")
    page.get_by_role("combobox", name="Model").select_option("odd")
    page.get_by_label("Input as JSON").fill("[4, 5]")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Answer").locator("pre")).to_contain_text('"embedding": [')
    page.get_by_role("combobox", name="Model").select_option("bert")
    page.get_by_label("Texts, one a line").fill("one\ntwo\nthree")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("td")).to_have_text(["1.00", "0.71", "1.00", "0.71", "1.00", "0.71", "1.00", "0.71", "1.00"])
    page.evaluate("location.hash = 'sst2'")
    expect(page.get_by_label("Text", exact=True)).to_be_visible()


@every_look
def test_a_forecast_is_drawn(visit, service, request):
    page = visit.page
    visit.open("ett")
    visit.allowed = ("400",)
    expect(page.locator("#hint")).to_have_text("96 rows or more of HUFL, OT")
    t = np.arange(100)
    rows = [f"2016-07-{1 + i // 24:02d},{-3 + np.cos(i / 9):.3f},7,{20 + 4 * np.sin(i / 4):.3f}" for i in t]
    page.locator("#text").fill("\n".join(["date,OT,other,HUFL", *rows]))
    page.get_by_role("button", name="Forecast").click()
    expect(page.locator("figcaption")).to_have_text(["HUFL", "OT"])
    (table,) = service.seen[0]["inputs"]
    assert len(table) == 100 and table[-1] == pytest.approx([20 + 4 * np.sin(99 / 4), -3 + np.cos(11)], abs=1e-3)  # the model's columns, by name
    points = page.locator("figure").first.locator("polyline.future").get_attribute("points").split()
    assert len(points) == 49 and page.locator("polyline.past").count() == 2
    expect(page.locator("figure").first.locator("svg")).to_have_attribute("aria-label", re.compile("HUFL: 96 rows of the past, then a forecast of 48"))
    visit.picture(f"forecast-{request.node.callspec.id}")
    page.get_by_text("Numbers").click()
    expect(page.get_by_label("Answer").locator("pre")).to_contain_text("HUFL,OT")
    page.locator("#text").fill("1,2\n3,x")
    page.get_by_role("button", name="Forecast").click()
    expect(page.get_by_role("alert")).to_have_text("Row 2 of the table has a cell that is no number: 3,x")
    page.locator("#text").fill("1,2\n3,4")
    page.get_by_role("button", name="Forecast").click()
    expect(page.get_by_role("alert")).to_have_text("the table has 2 rows, and the model reads the last 96.")
    page.get_by_role("button", name="Example").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_all_is_reached_by_the_keyboard(visit, service):
    page = visit.page
    visit.open("chat")
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert seen[:5] == ["model", "SUMMARY", "text", "clear", "send"]
    assert page.evaluate("[...document.querySelectorAll('input, select, textarea')].every((each) => each.labels.length)")


def test_the_real_service_answers_the_page(browser, folder, tmp_path):
    """Small runs with random weights: what the page shows is what the API answers."""
    names = ("chat", "gpt", "images", "tags", "table", "pairs", "words")
    models = served_runs.serve_models(served_runs.write_runs(tmp_path / "runs", *names), make=make_engine)

    with served_runs.live(models) as live, visiting(browser, live.url + "/", folder) as visit:
        page = visit.page

        def answer(path, **body):
            done = httpx.post(f"{live.url}/v1/{path}", json=body)
            assert done.status_code == 200, done.text
            return done.json()

        visit.open("chat")
        page.get_by_text("Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max. tokens").fill("12")
        page.get_by_label("Message").fill("the cat")
        page.get_by_label("Message").press("Enter")
        expect(page.get_by_role("status")).to_have_text("The answer is complete.")
        said = answer("chat/completions", model="chat", messages=[{"role": "user", "content": "the cat"}], temperature=0, max_tokens=12)["choices"][0][
            "message"
        ]
        assert page.locator("article.model p").text_content() == said["content"]
        page.get_by_label("Message").fill("raise")
        page.get_by_label("Message").press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("no such talk")
        visit.allowed = ("400",)

        page.get_by_role("combobox", name="Model").select_option("gpt")
        page.get_by_label("Text to continue").fill("the cat ")
        page.get_by_label("Text to continue").press("Enter")
        expect(page.get_by_role("status")).to_have_text("The answer is complete.")
        said = answer("completions", model="gpt", prompt="the cat ", temperature=0, max_tokens=12)["choices"][0]["text"]
        assert page.locator("article.model p").text_content() == "the cat " + said

        image = tmp_path / "image.png"
        image.write_bytes(served_runs.png((20, 30, 3)))
        visit.open("images")
        page.locator("#file").set_input_files(image)
        labels = answer("predict", model="images", inputs=[base64.b64encode(image.read_bytes()).decode()])["results"][0]["labels"]
        expect(page.locator(".bars span")).to_have_text([each["label"] for each in labels])

        visit.open("tags")
        page.get_by_label("Text", exact=True).fill("anna in paris")
        page.get_by_label("Text", exact=True).press("Enter")
        spans = answer("predict", model="tags", inputs=["anna in paris"])["results"][0]["spans"]
        expect(page.locator("mark")).to_have_text([each["text"] + each["label"] for each in spans])

        visit.open("table")
        page.get_by_label("Rows of the past").fill("heat;load\n1;2\n2;3,5\n3;4\n4;5\n")
        page.get_by_role("button", name="Forecast").click()
        expect(page.locator("figcaption")).to_have_text(["load", "heat"])
        rows = answer("predict", model="table", inputs=[[[2, 1], [3.5, 2], [4, 3], [5, 4]]])["results"][0]["forecast"]
        assert page.locator("#answer pre").text_content().splitlines()[1] == ",".join(map(str, rows[0]))

        visit.open("pairs")
        page.get_by_label("First text").fill("a cat")
        page.get_by_label("Second text").fill("a dog")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".bars li")).to_have_count(2)

        visit.open("words")
        page.get_by_label("Texts, one a line").fill("the cat\nthe dog")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("td").first).to_have_text("1.00")
