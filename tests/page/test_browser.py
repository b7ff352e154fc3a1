"""The page in a real browser: Chromium, driven by Playwright, against a served model. Skipped where there is none."""

import json
import re
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from playwright.sync_api import expect

from experiments.draw_page import chromium, find_chromium, serving

no_browser = "the tests of the page need Chromium, and none was found: apt-get install chromium"
pytestmark = pytest.mark.skipif(find_chromium() is None, reason=no_browser)
GREEDY = "#length=12&temperature=0"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")  # a run folder with the released model
    (run / "config.yaml").write_text('sample_prompt: "def main("\n')
    (run / "best").symlink_to(Path("checkpoints/python").resolve())
    with serving(str(run), "--puzzle", "checkpoints/sudoku") as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """A page that has loaded. `page.sent` collects the bodies of its requests by path. Fails if the console had errors,
    or if the page asked another host for something."""
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 800})
    page, errors = context.new_page(), []
    page.sent, page.errors, page.finished, page.awaited = {}, errors, 0, 0
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: keep(page.sent, errors, address, request))
    for event in ("requestfinished", "requestfailed"):  # a stream that the page stops reading has failed
        page.on(event, lambda request: count_finished(page, request))
    page.set_default_timeout(10_000)
    yield page
    context.close()
    assert errors == []


def keep(sent, errors, address, request):
    if not request.url.startswith(address):
        errors.append(f"a request to {request.url}")
    if request.method == "POST":
        sent.setdefault(request.url.removeprefix(f"{address}/v1/"), []).append(json.loads(request.post_data))


def count_finished(page, request):
    page.finished += request.url.endswith("/completions")


def written(page):
    """Waits until the model has written what the page asked for since the last call, and the page shows it."""
    for _ in range(1000):
        if page.finished > page.awaited and page.finished == len(page.sent.get("completions", [])):
            break
        page.wait_for_timeout(20)
    page.awaited = page.finished
    drawn(page)
    expect(page.locator("#write")).to_be_visible(timeout=20_000)
    expect(page.locator(".token.written, .token.taken").first).to_be_visible()
    drawn(page)


def write(page, text, settings=GREEDY):
    """Opens the page, types a text and lets the model write on."""
    page.goto(f"/{settings}")
    page.get_by_role("textbox", name="The text").fill(text)
    page.keyboard.press("Control+Enter")
    written(page)


def drawn(page):
    """Waits until the page shows its newest state: it draws once per frame."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def text_of(page, number=0):
    """Returns the text of a branch as it is shown."""
    drawn(page)
    return page.locator("[role=listbox]").nth(number).evaluate("list => list.textContent")


# ---- text -----------------------------------------------------------------------------------------------------------


def test_type_and_write(page):
    page.goto(f"/{GREEDY}")
    page.get_by_role("button", name="Example").click()  # types the prompt of the run's samples
    expect(page.get_by_role("textbox", name="The text")).to_have_value("def main(")
    expect(page.get_by_role("button", name="Example")).to_be_hidden()
    page.keyboard.press("Control+Enter")
    written(page)
    sent = page.sent["completions"][0]
    assert sent["stream"] and sent["max_tokens"] == 12 and sent["temperature"] == 0
    assert len(sent["prompt"]) == 1 + page.locator(".token.typed").count() > 1  # BOS, and what was typed
    expect(page.locator(".token.written")).to_have_count(12)
    tints = page.locator(".token.written").evaluate_all("tokens => tokens.map(t => /\\bt[0-6]\\b/.test(t.className))")
    assert all(tints) and text_of(page).startswith("def main(")
    expect(page.locator("#status")).to_have_text("Done: 12 tokens written.")
    assert re.search(r"\d tokens/s", page.locator("#card").inner_text())


def test_hover_and_select_show_what_the_model_thought(page):
    write(page, "def main(", GREEDY + "&depth=3")
    inspector, tokens = page.locator("#inspector"), page.locator(".token.written")
    tokens.nth(2).click()
    pinned = inspector.locator("h2 code").inner_text()
    tokens.nth(5).hover()
    expect(inspector).to_contain_text(f"token {1 + page.locator('.token.typed').count() + 5} ")
    page.locator("h1").hover()  # away from the text: the token that was clicked shows again
    expect(inspector.locator("h2 code")).to_have_text(pinned)
    expect(inspector.locator("tbody tr")).to_have_count(3)  # a row per recursion step
    shares = inspector.locator("tbody tr td:nth-child(3)").all_text_contents()
    assert all(re.fullmatch(r"(\d+|\d\.\d|<\s0\.1)\s%", share) for share in shares)
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(3)).to_be_focused()
    expect(tokens.nth(3)).to_have_attribute("aria-selected", "true")


def test_take_a_rival_undo_redo(page):
    write(page, "def main(")
    before, first = text_of(page), page.sent["completions"][0]["prompt"]
    page.locator(".token.written").nth(2).click()
    rival = page.locator(".rival:not(.same)").first
    rival.click()
    written(page)
    expect(page.locator(".token.taken")).to_have_count(1)
    expect(page.locator(".token.taken")).to_be_focused()
    prompt = page.sent["completions"][1]["prompt"]  # ids of the text up to the rival, and that of the rival
    assert prompt[: len(first)] == first and len(prompt) == len(first) + 3
    assert len(page.sent["tokenize"]) == 1, "tokens that are kept are not tokenized again"
    after = text_of(page)
    assert after != before
    page.keyboard.press("Control+z")
    expect(page.locator(".token.taken")).to_have_count(0)
    assert text_of(page) == before
    page.keyboard.press("Control+Shift+z")
    expect(page.locator(".token.taken")).to_have_count(1)
    assert text_of(page) == after


def test_a_rival_beside_the_text(page):
    write(page, "def main(")
    before = text_of(page)
    page.locator(".token.written").nth(3).focus()
    page.get_by_label("keep this text beside the new one").check()
    page.locator(".token.written").nth(3).focus()
    page.keyboard.press("Enter")  # to the rivals
    page.keyboard.press("Enter")
    written(page)
    expect(page.locator(".branch")).to_have_count(2)
    assert text_of(page, 0) == before != text_of(page, 1)
    typed = page.locator(".branch").nth(0).locator(".token.typed").count()
    expect(page.locator("#figures")).to_contain_text(f"the same for {typed + 3} tokens, then they part. Text B: ")
    expect(page.locator(".token.parts")).to_have_count(2)
    page.get_by_label("Close Text B").click()
    expect(page.locator(".branch")).to_have_count(1)


def test_edit_tokenizes_only_the_tail(page):
    write(page, "def main(")
    tokens = page.locator("[role=option]").evaluate_all("all => all.map(token => token.textContent)")
    typed = page.locator(".token.typed").count()
    page.locator(".token.written").nth(4).dblclick()
    field = page.get_by_role("textbox", name="The text")
    at = len("".join(tokens[: typed + 5]))
    assert field.evaluate("field => field.selectionStart") == at
    page.keyboard.type("edited")
    page.keyboard.press("Escape")
    expect(field).to_be_hidden()
    text = "".join(tokens)
    expect(page.locator("[role=listbox]")).to_have_text(text[:at] + "edited" + text[at:], use_inner_text=False)
    assert page.sent["tokenize"][-1] == {"text": "edited" + text[at:], "inside": True}
    expect(page.locator(".token.written")).to_have_count(5)
    page.locator("#write").click()
    expect(page.locator(".token.written")).to_have_count(17)
    written(page)
    page.locator("#undo").click()
    page.locator("#undo").click()
    assert text_of(page) == text


def test_write_on_from_the_middle(page):
    write(page, "def main(")
    tokens = page.locator("[role=option]").evaluate_all("all => all.map(token => token.textContent)")
    page.locator(".token.written").nth(2).dblclick()
    page.keyboard.type("new")
    page.keyboard.press("Control+Shift+Enter")
    expect(page.locator(".token.written")).to_have_count(3 + 12)
    written(page)
    kept = page.locator("[role=option]").count() - 12
    assert text_of(page).startswith("".join(tokens[: len(tokens) - 9]) + "new")
    prompt, first = page.sent["completions"][1]["prompt"], page.sent["completions"][0]["prompt"]
    assert prompt[: len(first)] == first and len(prompt) == 1 + kept
    page.keyboard.press("ArrowRight")  # the text has the focus
    expect(page.locator("[role=option]").nth(kept)).to_be_focused()  # the first token of the new passage


def test_again_and_next_seed(page):
    write(page, "def main(", "#length=12&temperature=1")
    first = text_of(page)
    page.locator("#again").click()
    expect(page.locator(".token.written")).to_have_count(12)
    written(page)
    assert text_of(page) == first
    page.locator("#reseed").click()
    expect(page.locator("#set-seed")).to_have_value("2")
    expect(page.locator(".token.written")).to_have_count(12)
    written(page)
    assert text_of(page) != first
    prompts = [(body["prompt"], body["seed"]) for body in page.sent["completions"]]
    assert prompts == [(prompts[0][0], 1), (prompts[0][0], 1), (prompts[0][0], 2)]


def test_again_after_the_prompt_was_corrected(page):
    write(page, "def maim(")
    passage = text_of(page).removeprefix("def maim(")
    page.locator("#edit").click()
    page.get_by_role("textbox", name="The text").fill(f"def main({passage}")
    page.keyboard.press("Escape")
    drawn(page)
    page.locator("#again").click()
    written(page)
    first, again = (body["prompt"] for body in page.sent["completions"])
    assert len(again) > 2 and again != first and text_of(page).startswith("def main(")
    page.locator("#edit").click()
    page.get_by_role("textbox", name="The text").fill("class")  # no passage is left
    page.keyboard.press("Escape")
    drawn(page)
    expect(page.locator("#again")).to_be_disabled()


def test_two_depths_of_a_text_without_a_prompt(page):
    page.goto(f"/{GREEDY}")
    page.get_by_role("textbox", name="The text").press("Control+Enter")
    written(page)
    page.locator("#compare").click()
    page.get_by_label("left").fill("1")
    page.get_by_label("right").fill("3")
    page.keyboard.press("Enter")
    expect(page.locator("#figures strong")).to_be_visible(timeout=20_000)
    assert [len(body["prompt"]) for body in page.sent["completions"]] == [1, 1, 1]  # BOS


def test_depth_and_two_depths(page):
    write(page, "def main(")
    slider = page.get_by_role("slider", name="Depth")
    deeper = int(slider.input_value()) + 1
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figures strong")).to_contain_text("Again writes the last passage with them")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#figures strong")).to_have_count(0)
    page.keyboard.press("ArrowRight")
    page.locator("#again").click()
    written(page)
    assert page.sent["completions"][-1]["recursion"]["depth"] == deeper
    expect(page.locator("#figures")).to_contain_text(
        re.compile(rf"choice changed (after step \d of {deeper}|in the last step, {deeper})$")
    )
    expect(page.locator(".branch .note")).to_have_text(f"depth {deeper} · greedy")
    page.locator("#compare").click()
    page.get_by_label("left").fill("1")
    page.get_by_label("right").fill("3")
    page.keyboard.press("Enter")
    expect(page.locator("#figures strong")).to_be_visible(timeout=20_000)
    one, other = page.sent["completions"][-2:]
    assert (one["recursion"]["depth"], other["recursion"]["depth"]) == (1, 3)
    assert {**one, "recursion": 0} == {**other, "recursion": 0}
    for number, depth in ((0, 1), (1, 3)):
        expect(page.locator(".branch .note").nth(number)).to_have_text(f"depth {depth} · greedy")
    marks = (
        page.locator(".branch")
        .first.locator("[role=option]")
        .evaluate_all("all => all.findIndex(token => token.classList.contains('parts'))")
    )
    parting = f"are the same for {marks} tokens, then they part." if marks >= 0 else "are the same."
    assert page.locator("#figures strong").inner_text() == f"The two texts {parting}"
    # address and Again are those of the text that is looked at
    for name, depth in (("Text B", 3), ("Text A", 1)):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page).to_have_url(re.compile(rf"[#&]depth={depth}(&|$)"))
        expect(page.locator("#figures strong")).not_to_contain_text("settings have changed")
    page.locator("#again").click()
    written(page)
    assert page.sent["completions"][-1]["recursion"]["depth"] == 1
    page.locator("#undo").click()  # Again
    page.locator("#undo").click()  # Compare
    expect(page).to_have_url(re.compile(rf"[#&]depth={deeper}(&|$)"))
    # comparing is over: what is set from now on stays, whichever token is looked at
    page.locator("#reseed").click()
    written(page)
    page.get_by_role("option").first.click()
    expect(page).to_have_url(re.compile(r"[#&]seed=2(&|$)"))


def test_stop(page):
    page.goto("/#length=400")
    page.get_by_role("textbox", name="The text").fill("def main(")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token.written").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#write")).to_be_visible()
    count = page.locator(".token.written").count()
    assert 3 < count < 400
    page.wait_for_timeout(200)
    assert page.locator(".token.written").count() == count
    for _ in range(100):
        if stopped := re.search(r"^trm_running 0$", page.request.get("/metrics").text(), re.M):
            break
        page.wait_for_timeout(50)
    assert stopped, "the server still writes"
    expect(page.locator("#status")).to_contain_text("Stopped")


def test_reload_from_the_address(page):
    write(page, "def main(", "#length=12&temperature=0.5&seed=7&depth=2&tint=settled")
    text = text_of(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#link").click()
    expect(page.locator("#link")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    page.goto("/")
    page.goto(link)
    expect(page.locator("[role=listbox]")).to_have_text(text, use_inner_text=False)
    for name, value in {"seed": "7", "length": "12", "depth": "2", "temperature": "0.5", "tint": "settled"}.items():
        expect(page.locator(f"#set-{name}")).to_have_value(value)
    page.locator("#again").click()  # the address also says where the passage began
    expect(page.locator(".token.written")).to_have_count(12)
    written(page)
    assert text_of(page) == text


def test_a_busy_server_and_a_refused_request(page):
    page.goto(f"/{GREEDY}")
    answers = [{"status": 429, "headers": {"Retry-After": "0.3"}, "json": {"error": {"message": "full"}}}]
    page.route("**/v1/completions", lambda route: route.fulfill(**answers.pop()) if answers else route.fallback())
    page.get_by_role("textbox", name="The text").fill("def main(")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("busy")
    written(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    answers.append({"status": 400, "json": {"error": {"message": "the <b>depth</b> is wrong"}}})
    page.locator("#again").click()
    expect(page.get_by_role("alert")).to_have_text("the <b>depth</b> is wrong")
    assert [re.search(r"status of (\d+)", error)[1] for error in page.errors] == ["429", "400"]
    page.errors.clear()


def test_texts_are_text(page):
    """Markup in a text is shown, and half characters wait for their other half."""
    page.goto("/")
    page.get_by_role("textbox", name="The text").fill("<img src=x onerror=alert(1)> é京")
    page.keyboard.press("Escape")
    expect(page.locator("[role=listbox]")).to_have_text("<img src=x onerror=alert(1)> é京", use_inner_text=False)
    assert page.locator("img").count() == 0
    assert page.locator(".token.half").count() > 0, "this tokenizer spells these characters in bytes"


def test_what_is_computed_from_tokens(page):
    """The functions of tokens.js, on tokens that no small model is sure to write."""
    page.goto("/")

    def call(function, *values):
        code = f"async (values) => (await import('/static/tokens.js')).{function}(...values)"
        return page.evaluate(code, values)

    def tokens(*pieces, kind="written"):
        return [{"id": i, "text": "", "bytes": list(piece), "kind": kind} for i, piece in enumerate(pieces)]

    kyo = tokens(b"\xe4", b"\xba\xaca", b"\xe4", b"b")
    assert call("shownTexts", kyo) == ["", "京a", "", "\ufffdb"]
    assert [call("nameOf", token) for token in kyo[:2]] == ["<E4>", "<BA><AC><61>"]
    # an edit keeps whole characters, and what was written before it; typed tokens are tokenized again
    assert call("keptBefore", kyo[:2], "京ab") == {"kept": 2, "tail": "b"}
    assert call("keptBefore", kyo[:2], "京b") == {"kept": 0, "tail": "京b"}
    text = tokens(b"ab", b"c") + tokens(b"d", b"e", kind="typed")
    assert call("keptBefore", text, "abcde") == {"kept": 4, "tail": ""}
    assert call("keptBefore", text, "abcdef") == {"kept": 2, "tail": "def"}
    assert call("keptBefore", text, "abx") == {"kept": 1, "tail": "x"}
    assert call("bytesOf", "bytes:\\xe4\\xba") == [0xE4, 0xBA] and call("bytesOf", "é") == [0xC3, 0xA9]
    assert call("partAt", text, text[:1] + kyo) == 1 and call("partAt", text, text[:2]) is None
    step = [
        {"halt": None, "entropy": 1, "p": own, "top": [[i, name, p]]}
        for i, name, p, own in ((1, "a", 0.5, 0.2), (2, "b", 0.6, 0.6))
    ]
    changed = {"id": 2, "text": "b", "bytes": [98], "kind": "written", "steps": 3, "p": 0.7, "trace": [*step, step[1]]}
    assert call("settledAt", changed) == 2 and call("settledAt", changed | {"trace": step[:1]}) == 1
    found = call("candidates", changed)
    assert [(c["id"], c["p"], c["role"]) for c in found] == [
        (2, [0.2, 0.6, 0.7], "written"),
        (1, [0.5, 0, 0], "leader"),
    ]
    taken = call("candidates", changed | {"kind": "taken"})  # in place of the token that the trace is of
    assert taken[0]["p"] == [0, 0.6, 0.7]
    assert [call("level", changed, tint, 4) for tint in ("certainty", "steps", "settled", "none")] == [4, 4, 2, None]


def test_a_link_is_fitted_to_the_model(page):
    page.goto("/")
    code = "async ([settings, card]) => (await import('/static/settings.js')).fitting(settings, card)"
    card = {"max_depth": 16, "depth": 4, "exits": ["kl"], "backend": "torch"}
    fixed = card | {"backend": "onnx"}
    for settings, model, wanted in (
        ({"depth": 64, "seed": 2}, card, {"depth": 16, "seed": 2}),
        ({"exit": "halt", "threshold": 0.9}, card, {}),
        ({"exit": "kl", "threshold": 0.1}, card, {"exit": "kl", "threshold": 0.1}),
        ({"depth": 1, "exit": "kl", "top_p": 1}, fixed, {"top_p": 1}),
    ):
        assert page.evaluate(code, [settings, model]) == wanted


def compare_depths(page, left=1, right=3):
    page.locator("#compare").click()
    page.get_by_label("left").fill(str(left))
    page.get_by_label("right").fill(str(right))
    page.keyboard.press("Enter")
    written(page)


def test_the_panel_acts_on_the_text_that_was_looked_at(page):
    """Texts beside each other share the tokens of their prompt."""
    page.set_viewport_size({"width": 800, "height": 900})  # pointing at a token does not open the panel
    write(page, "def main(")
    compare_depths(page)
    before = text_of(page, 0)
    for name in ("Text A", "Text B"):
        page.get_by_role("listbox", name=name).get_by_role("option").first.click()
    page.get_by_role("button", name="Cut after it").click()
    assert (
        text_of(page, 0) == before and before.startswith(text_of(page, 1)) and len(text_of(page, 1)) < len("def main(")
    )


def test_the_panel_is_empty_while_its_text_is_edited(page):
    write(page, "def main(")
    page.locator(".token.written").nth(2).click()
    expect(page.locator(".rival").first).to_be_visible()
    page.locator("#edit").click()
    expect(page.locator(".rival")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator(".rival").first).to_be_visible()


def test_what_was_typed_is_never_lost(page):
    write(page, "def main(")
    page.locator("#edit").click()
    field = page.get_by_role("textbox", name="The text")
    field.fill("a long new text")
    refused = {"status": 400, "json": {"error": {"message": "too long"}}}
    page.route("**/v1/tokenize", lambda route: route.fulfill(**refused))
    page.locator("#compare").click()
    page.get_by_role("button", name="Write both").click()
    expect(page.get_by_role("alert")).to_have_text("too long")
    expect(field).to_have_value("a long new text")
    page.locator("#link").click()
    expect(field).to_have_value("a long new text")
    page.unroute("**/v1/tokenize")
    page.evaluate("location.hash = 'text=another'")  # the edit becomes a change that can be undone
    expect(page.locator("[role=listbox]")).to_have_text("another", use_inner_text=False)
    page.locator("#undo").click()
    expect(page.locator("[role=listbox]")).to_have_text("a long new text", use_inner_text=False)
    assert len(page.errors) == 2
    page.errors.clear()


def test_a_setting_stays_when_a_token_of_the_same_text_is_selected(page):
    write(page, "def main(")
    compare_depths(page)
    page.get_by_label("Close Text B").click()
    slider = page.get_by_role("slider", name="Depth")
    slider.fill("2")
    page.locator(".token.written").nth(1).click()
    expect(slider).to_have_value("2")
    page.locator("#again").click()
    written(page)
    assert page.sent["completions"][-1]["recursion"]["depth"] == 2


def test_a_key_that_was_mistyped(page):
    answers = [401, 503]
    refuse = {"json": {"error": {"message": "no"}}}
    page.route(
        "**/v1/model_card",
        lambda route: route.fulfill(status=answers.pop(0), **refuse) if answers else route.fallback(),
    )
    page.goto("/")
    field = page.locator("#key input")
    for key, said in (("\u201csecret\u201d", "ASCII"), ("secret", "no")):
        field.fill(key)
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(said)
    field.press("Enter")  # the server answers again
    expect(page.locator("#key")).to_be_hidden()
    assert len(page.errors) == 2
    page.errors.clear()


def test_alerts_end_with_what_they_are_about(page):
    page.goto(f"/{GREEDY}")
    busy = {"status": 429, "headers": {"Retry-After": "30"}, "json": {"error": {"message": "full"}}}
    page.route("**/v1/completions", lambda route: route.fulfill(**busy))
    page.get_by_role("textbox", name="The text").fill("def main(")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("busy")
    page.locator("#stop").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute("**/v1/completions")
    wrong = {"status": 400, "json": {"error": {"message": "depth 3 has no room"}}}
    page.route(
        "**/v1/completions",
        lambda route: (
            route.fulfill(**wrong) if route.request.post_data_json["recursion"]["depth"] == 3 else route.fallback()
        ),
    )
    compare_depths(page)  # the other text is written meanwhile
    expect(page.get_by_role("alert")).to_have_text("depth 3 has no room")
    page.errors.clear()


def test_numbers_count_at_once(page):
    write(page, "def main(", "#length=4&temperature=1")
    page.locator("#set-seed").fill("7")
    page.keyboard.press("Control+Enter")
    written(page)
    assert page.sent["completions"][-1]["seed"] == 7
    page.locator("#set-length").fill("")
    page.keyboard.press("Tab")
    expect(page.locator("#set-length")).to_have_value("64")


def test_a_link_does_not_begin_inside_a_character(page):
    page.goto("/")
    face = [0xF0, 0x9F, 0x99, 0x82]
    tokens = [{"bytes": [97]}, {"bytes": face[:2]}, {"bytes": face[2:]}]
    code = "async (branch) => (await import('/static/state.js')).toFragment(branch, {})"
    fields = parse_qs(page.evaluate(code, {"tokens": tokens, "start": 2}))
    assert fields == {"text": ["a\U0001f642"], "start": ["1"]}


# ---- boards ---------------------------------------------------------------------------------------------------------


def test_board(page):
    page.goto("/#board=")
    expect(page.locator("#card")).to_contain_text("sudoku, TRM")
    expect(page.locator(".verdict")).to_contain_text("0 or a space for an empty cell")
    board = page.get_by_role("group", name="Board of 9 by 9")
    board.get_by_label("row 1, column 1", exact=True).focus()
    page.keyboard.type("55")
    expect(page.locator(".cell.wrong")).to_have_count(2)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")
    expect(page.locator(".cell.clue")).to_have_count(1)
    page.get_by_role("button", name="Example").click()
    question = page.locator(".cell").evaluate_all("cells => cells.map(cell => cell.value || '.').join('')")
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("#step")).to_have_attribute("max", "16")
    assert page.sent["puzzle"][0]["board"] == question
    slider = page.locator("#step")
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator(".verdict")).to_contain_text("; right;")
    answer = page.locator(".cell").evaluate_all("cells => cells.map(cell => cell.value).join('')")
    assert all(a == q or q == "." for a, q in zip(answer, question, strict=True)) and len(set(answer[:9])) == 9
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("output[for=step]")).to_have_text("2 of 16")
    assert page.locator(".cell.changed").count() > 0 and page.locator(".cell[class*=' t']").count() > 0
    page.get_by_role("button", name="More steps").click()
    expect(slider).to_have_attribute("max", "32")
    page.reload()
    expect(page.locator(".cell.clue")).to_have_count(sum(c != "." for c in question))


def test_a_board_may_be_wrong_without_a_wrong_cell(page):
    """The right answer is not known, and the rules do not say which cell is wrong."""
    steps = [
        {"board": "1" + "." * 80, "certainty": [0.5] * 81, "halt": 0.1, "changed": [0], "wrong": None, "right": False}
    ]
    answer = {"steps": steps, "solved": False, "message": "wrong after 1 step"}
    page.route("**/v1/puzzle", lambda route: route.fulfill(json=answer))
    page.goto("/#board=")
    page.get_by_role("button", name="Example").click()
    page.get_by_role("button", name="Solve").click()
    expect(page.locator(".verdict")).to_contain_text("The first answer; wrong; the model is")


# ---- every screen, every reader -------------------------------------------------------------------------------------


def problems(page):
    """Returns what axe-core (Deque, MPL 2.0) finds wrong for people who use assistive technology, in both themes."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = []
    for colours, options in (("light", "{}"), ("dark", "{runOnly: ['color-contrast']}")):
        page.emulate_media(color_scheme=colours)
        found += page.evaluate(f"async () => (await axe.run({options})).violations")
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"][:3]]) for rule in found]


def test_accessible(page):
    write(page, "def main(", GREEDY + "&depth=2")
    page.locator(".token.written").nth(2).click()
    page.locator("#compare").click()
    page.locator("summary", has_text="Step by step").click()
    page.locator("summary", has_text="How to use").click()
    assert problems(page) == []
    page.get_by_role("button", name="Puzzle").click()
    page.get_by_role("button", name="Example").click()
    page.get_by_role("button", name="Solve").click()
    expect(page.locator(".cell.changed").first).to_be_visible()
    assert problems(page) == []


def test_a_narrow_screen(page):
    page.set_viewport_size({"width": 360, "height": 700})
    page.emulate_media(reduced_motion="reduce")
    write(page, "def main(")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    token = page.locator(".token.written").nth(8)
    token.click()
    expect(page.locator("#inspector h2 code")).to_be_visible()
    assert page.evaluate(overflow) <= 0
    box, sheet = token.bounding_box(), page.locator("#inspector").bounding_box()
    assert box["y"] + box["height"] <= sheet["y"], "the panel does not cover the token"
    page.get_by_label("Close this panel").click()
    token.click()
    page.locator(".rival:not(.same)").first.click()
    expect(page.locator("#inspector h2 code")).to_be_hidden()  # so that the new text can be read
    page.get_by_role("button", name="Puzzle").click()
    page.get_by_role("button", name="Example").click()
    page.get_by_role("button", name="Solve").click()
    expect(page.locator("output[for=step]")).to_have_text("16 of 16")  # without motion, the answer shows at once
    assert page.evaluate(overflow) <= 0
