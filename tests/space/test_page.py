"""The Space in a real Chromium, used as a person would: through `hf-msae space run`, with eyes and hands.

Every page is watched: whatever it asks of another machine, every error in its console and every exception in it fails
the test that opened it.
"""

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import HANG_SECONDS, until
from warm_processes import free_port, start_command

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.steering import Gate, LatentEdit, SteeredPipeline, Steering
from hf_msae.worlds.stories import load_story_lm

pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path (apt-get install chromium)"),
]

EVIL = '<img src=x onerror="alert(1)">${alert(2)}'
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TABS = ("Steer", "Find", "Explore", "Tree", "Levels", "Compare")
WAIT_MS = 1000 * HANG_SECONDS
# Fewer new tokens than the page has by default.
SHORT = "?tokens=10"


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=HANG_SECONDS).close()
    except OSError:  # nobody listens there yet
        return False
    return True


@pytest.fixture(scope="module")
def server(story_sae: Path, index: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, which finds the presets that were tried out for `index`."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    process = start_command(["space", "run", str(story_sae), "--port", str(port)], log)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.exitcode is not None or answers(address))
        assert process.exitcode is None, f"the server ended: {log.read_text()[-3000:]}"
        yield address
    finally:
        process.terminate()
        process.join(timeout=HANG_SECONDS)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser(chromium):
    """One for all visitors, who are told apart by their pages: so Gradio's scripts are fetched and compiled once."""
    context = chromium.new_context(viewport=DESKTOP, reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture(scope="module")
def problems() -> list[str]:
    """Whatever goes wrong in a page."""
    return []


@pytest.fixture(autouse=True)
def unbroken(problems: list[str]) -> Iterator[None]:
    """Nothing goes wrong in any page during a test."""
    problems.clear()
    yield
    assert problems == []


@pytest.fixture(scope="module")
def opened(server: str, browser, problems: list[str]) -> Callable:
    """Opens the page as another visitor, and watches it."""

    def open_page(query: str = SHORT):
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((server, "data:", "blob:")) else problems.append(f"asked {request.url}")
            ),
        )
        page.goto(server + query)
        page.wait_for_selector("#presets button", state="attached")
        return page

    return open_page


@pytest.fixture
def visit(opened: Callable) -> Iterator[Callable]:
    """Opens the page as another visitor each time."""
    pages = []

    def open_page(query: str = SHORT):
        pages.append(opened(query))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def regular(opened: Callable):
    """A visitor who stays: most of what a page costs is its opening."""
    return opened()


@pytest.fixture
def page(regular):
    """The page of the visitor who stays, on the Steer tab with nothing steered, as it is when it is opened."""
    regular.set_viewport_size(DESKTOP)
    regular.emulate_media(color_scheme="light")
    go_to(regular, "Steer")
    # Of latents and of conditions.
    while number := regular.locator("#dials .msae-remove").count():
        regular.locator("#dials .msae-remove").first.click()
        regular.wait_for_function(f"document.querySelectorAll('#dials .msae-remove').length < {number}")
    choose_method(regular, "Add")
    fill_setting(regular, "Seed", 0)
    fill_setting(regular, "number input for New tokens", 10)
    regular.locator("#prompt textarea").fill("Once upon a time, there was a")
    forget(regular)
    return regular


def go_to(page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("tab", name=tab, selected=True).wait_for()


def choose_method(page, name: str) -> None:
    if not page.locator("#method input").input_value().startswith(name):
        page.locator("#method input").click()
        page.get_by_role("option", name=name).click()


def fill_setting(page, label: str, value: int) -> None:
    """One of the numbers under "More settings"."""
    box = page.get_by_label(label)
    if not box.is_visible():
        page.get_by_role("button", name="More settings").click()
    if box.input_value() != str(value):
        box.fill(str(value))
        box.press("Tab")


def find(page, words: str) -> None:
    page.locator("#search :is(input, textarea)").fill(words)
    page.locator("#search :is(input, textarea)").press("Enter")
    page.wait_for_selector("#results button")


def add_latent(page, number: int) -> None:
    find(page, str(number))
    page.locator(f"#results button[data-do='add'][data-id='{number}']").click()
    page.wait_for_selector(f"#dials input[data-id='{number}']")


def set_dial(page, number: int, value: float) -> None:
    """As dragging does, which ends in the same two events."""
    page.locator(f"#dials input[data-id='{number}']").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true}));"
        " input.dispatchEvent(new Event('change', {bubbles: true})); }",
        value,
    )


def finish(page) -> tuple[str, str]:
    """Both texts, when they are complete: read at once, because a change may have begun the next ones."""
    text = "(pane) => document.querySelector(`#${pane}-text .msae-text`).innerText"
    done = f"document.querySelector('#texts [data-state=done]') && ['default', 'steered'].map({text})"
    plain, steered = page.wait_for_function(f"() => {done}").json_value()
    return plain, steered


def forget(page) -> None:
    """Marks the texts as old, so that `finish` waits for others."""
    page.evaluate("document.querySelectorAll('#texts [data-state]').forEach((one) => one.dataset.state = 'old')")


def generate(page, prompt: str | None = None) -> tuple[str, str]:
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    forget(page)
    page.locator("#generate").click()
    return finish(page)


def share(page) -> str:
    """What of the link to the present view follows the address."""
    field = "document.querySelector('#link :is(input, textarea)')"
    before = page.evaluate(f"{field}?.value ?? ''")
    page.locator("#share").click()
    page.wait_for_function(f"(before) => {field} && ![before, ''].includes({field}.value)", arg=before)
    return "?" + page.evaluate(f"{field}.value").split("?", 1)[1]


def expected(
    folder: Path, prompt: str, latents: dict[int, float], seed: int = 0, tokens: int = 10, when: Gate | None = None
) -> str:
    """What the pipeline writes without any page."""
    model, tokenizer = load_story_lm()
    sae = MatryoshkaSAE.from_pretrained(folder).eval()
    gates = () if when is None else (when,)
    steering = Steering([LatentEdit(latent, value, when=gates) for latent, value in latents.items()])
    pipe = SteeredPipeline(model, tokenizer, sae, steering)
    return pipe(prompt, seed=seed, temperature=0.7, max_new_tokens=tokens)[0]["generated_text"]


# Steer


def test_steering_streams_two_texts_of_one_seed(page, story_sae):
    fill_setting(page, "number input for New tokens", 24)
    add_latent(page, 7)
    set_dial(page, 7, 1.5)
    finish(page)  # letting go of a slider writes at once
    page.evaluate(
        "() => { window.lengths = []; const note = () => window.lengths.push("
        "document.querySelector('#default-text .msae-text')?.textContent.length);"
        " new MutationObserver(note).observe(document.querySelector('#texts'),"
        " {subtree: true, childList: true, characterData: true}); }"
    )
    prompt = "Once upon a time, there was a"
    default, steered = generate(page, prompt)
    assert len(set(page.evaluate("window.lengths"))) >= 4, "the text came in one piece"
    assert default == expected(story_sae, prompt, {}, tokens=24)
    assert default.startswith(prompt)
    assert steered == expected(story_sae, prompt, {7: 1.5}, tokens=24)
    assert re.search(r"Loss \d+\.\d\d nats per token", page.locator("#steered-text .msae-measure").inner_text())


def test_a_preset_is_one_click_to_its_words(page):
    add_latent(page, 7)
    preset = page.locator("#presets button").first
    words, why = preset.inner_text().split(", "), preset.get_attribute("title")
    assert re.search(r"in \d+% of texts instead of \d+%", why)
    forget(page)
    preset.click()
    default, steered = finish(page)
    prompt = page.locator("#prompt textarea").input_value()
    assert prompt != "Once upon a time, there was a"
    assert page.locator("#dials input").count() == 1, "a preset takes the place of other latents"
    assert page.locator("#dials .msae-pushes").inner_text() == f"leads to {', '.join(words)}"
    following = [re.match(r"\W*(\w*)", text.removeprefix(prompt))[1] for text in (default, steered)]
    assert following[1] in words
    assert following[0] not in words


def test_search_tells_what_steers_from_what_reads(page):
    page.locator("#search :is(input, textarea)").fill("owl")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("#results h4:has-text('Fire on it')")
    titles = page.locator("#results h4").all_inner_texts()
    assert titles[-1].startswith("Fire on it")
    number = page.locator("#results button").last.get_attribute("data-id")
    page.locator("#results button").last.click()
    page.wait_for_selector(f"#dials input[data-id='{number}']")


def test_presets_sliders_and_removal_by_keyboard(page):
    page.locator("#presets button").first.focus()
    page.keyboard.press("Enter")
    slider = page.locator("#dials input[type=range]")
    slider.wait_for()
    finish(page)  # a preset writes at once
    forget(page)
    before = page.locator("#dials output").inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    finish(page)
    after = page.locator("#dials output").inner_text()
    assert float(after[1:5]) == pytest.approx(float(before[1:5]) + 0.1)
    assert "× max" in after
    assert slider.get_attribute("aria-valuetext") == after
    assert page.evaluate("document.activeElement.type") == "range", "the slider lost the keyboard while it moved"
    page.keyboard.press("End")
    assert "msae-far" in page.locator("#dials .msae-dial").get_attribute("class")
    page.locator("#dials .msae-remove").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#dials input[type=range]", state="detached")


def test_stop_ends_the_texts(page):
    fill_setting(page, "number input for New tokens", 200)
    forget(page)
    page.locator("#generate").click()
    page.wait_for_function(
        "document.querySelector('[data-state=waiting] #default-text .msae-text')?.textContent.length > 60"
    )
    page.locator("#stop").click()
    default, _ = finish(page)
    assert len(default.split()) < 120


def test_methods_redraw_the_dials(page):
    add_latent(page, 3)
    choose_method(page, "Scale")
    page.wait_for_selector("#dials input[min='0'][max='4']")
    choose_method(page, "Ablate")
    page.wait_for_selector("#dials input[type=range]", state="hidden")


def test_steering_is_put_under_a_condition_and_freed_again(page, visit, story_sae):
    """A latent chosen by "only where", how strongly it must fire and where it lets steering act; the link keeps it."""
    add_latent(page, 7)
    set_dial(page, 7, 3)
    finish(page)
    prompt = "Once upon a time, there was a little owl. The"
    free = generate(page, prompt)
    find(page, "40")
    page.locator("#results button[data-do='condition'][data-id='40']").click()
    condition = page.locator("#dials .msae-condition[data-id='40']")
    condition.wait_for()
    assert page.locator("#dials .msae-under").inner_text() == "Only where this fires"
    assert condition.locator("output").inner_text() == "where active"
    forget(page)
    set_dial(page, 40, 0.25)
    finish(page)
    assert condition.locator("output").inner_text() == "above 0.25× max"
    forget(page)
    condition.locator("select").select_option("after")
    finish(page)
    gated = generate(page)
    assert gated == (free[0], expected(story_sae, prompt, {7: 3}, when=Gate(40, 0.25, "max", "after")))
    assert gated[1] != free[1], "the condition changed nothing, so this shows nothing"
    query = share(page)
    other = visit(query)
    assert finish(other) == gated
    assert other.locator("#dials .msae-condition select").input_value() == "after"
    page.get_by_role("button", name="Remove the condition on latent 40").click()
    condition.wait_for(state="detached")
    assert generate(page) == free


def test_a_share_link_restores_everything(page, visit, story_sae):
    add_latent(page, 7)
    set_dial(page, 7, 1.25)
    finish(page)
    add_latent(page, 40)
    fill_setting(page, "Seed", 11)
    texts = generate(page, "Lily & Tom went to the")
    query = share(page)
    assert page.evaluate("location.search") == query
    other = visit(query)
    assert finish(other) == texts
    assert other.locator("#prompt textarea").input_value() == "Lily & Tom went to the"
    assert other.locator("#dials input[type=range]").evaluate_all("(all) => all.map((one) => one.value)")[0] == "1.25"
    assert other.locator("#dials input[type=range]").count() == 2


def test_a_link_to_another_tab_opens_it_with_its_latent(visit):
    page = visit("?tab=explore&latent=12&text=A+little+owl.")
    page.wait_for_selector("#latent-page h2")
    assert "#12" in page.locator("#latent-page h2").inner_text()
    assert page.locator("#explore-text textarea").input_value() == "A little owl."


def test_a_broken_link_opens_what_it_can(visit):
    page = visit("?sae=%2Fetc&latents=5:1&method=shout")
    page.wait_for_selector("#status .msae-problem")
    words = page.locator("#status .msae-problem").inner_text()
    assert "method" in words
    assert "owner/name" in words
    assert page.locator("#dials input").count() == 0


def test_copied_python_is_the_run_that_is_shown(page):
    add_latent(page, 7)
    generate(page, "One day")
    page.get_by_role("button", name="Copy as Python").click()
    page.wait_for_selector("#code .cm-content")
    code = page.locator("#code .cm-content").inner_text()
    assert "LatentEdit(7, " in code
    assert "prompt = 'One day'" in code


def test_two_visitors_at_once_do_not_mix(page, visit, story_sae):
    wishes = [("Once upon a time, there was a", 7, 1.5), ("One day, Tom went to the", 3, -1.0)]
    pages = [page, visit()]
    for page, (prompt, latent, value) in zip(pages, wishes, strict=True):
        add_latent(page, latent)
        set_dial(page, latent, value)
        finish(page)
        page.locator("#prompt textarea").fill(prompt)
        forget(page)
    for page in pages:
        page.locator("#generate").click(no_wait_after=True)
    for page, (prompt, latent, value) in zip(pages, wishes, strict=True):
        assert finish(page) == (expected(story_sae, prompt, {}), expected(story_sae, prompt, {latent: value}))
        assert page.locator("#dials input").count() == 1


# The other tabs


def test_examples_lead_to_a_steering(page):
    go_to(page, "Find")
    page.locator("#find").click()
    page.wait_for_selector("#found [data-do='apply']")
    assert page.locator("#found .msae-table tbody tr").count() >= 6
    steering = page.locator("#found section", has=page.get_by_role("heading", name="A steering"))
    latents = steering.locator(".msae-latent").evaluate_all("(all) => all.map((one) => one.dataset.id)")
    forget(page)
    page.locator("#found [data-do='apply']").click()
    page.wait_for_selector(f"#dials input[data-id='{latents[0]}']")
    default, steered = finish(page)
    assert default != steered
    assert page.locator("#dials .msae-dial input").evaluate_all("(all) => all.map((one) => one.dataset.id)") == latents
    go_to(page, "Find")
    page.locator("#positive textarea").fill("One only.")
    page.locator("#find").click()
    page.wait_for_selector("text=There are 1 different positive examples")


def test_explore_goes_from_a_text_to_a_token_to_a_latent_to_steering(page):
    go_to(page, "Explore")
    page.wait_for_selector("#tokens button:text-is('Lily')")  # it begins with an example
    page.wait_for_selector("#latent-page .msae-contexts li")  # and with a latent that is active there
    seen = page.locator("#tokens button").evaluate_all("(all) => all.map((one) => [one.className, one.title])")
    levels = {title.split(":")[0].removeprefix("level ") for _, title in seen if title}
    assert len(levels) > 1
    assert all(f"msae-hue-{title[len('level ')]}" in look for look, title in seen if title)
    # On a click it is the chosen latent that is shown in the text.
    page.locator("#explore-text textarea").fill("Once upon a time, there was a little owl.")
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector("#tokens button:text-is('Lily')", state="detached")
    owl = page.locator("#tokens button", has_text="owl")
    owl.click()
    page.wait_for_selector("#token-latents button")
    assert "Latents on “owl”" in page.locator("#token-latents h3").inner_text()
    assert page.locator("#token-latents h4").count() >= 2, "latents of several levels"
    number = page.locator("#token-latents button").first.get_attribute("data-id")
    page.locator("#token-latents button").first.click()
    page.wait_for_function(f"document.querySelector('#latent-page h2')?.textContent.includes('#{number} ')")
    page.wait_for_selector("#latent-page .msae-contexts li")
    assert page.locator("#latent-page svg rect").count() > 10
    page.wait_for_function(
        "[...document.querySelectorAll('#tokens button')].some((one) => Number(one.style.getPropertyValue('--a')) > 0)"
    )
    page.get_by_role("button", name="Steer with it").click()
    page.wait_for_selector(f"#dials input[data-id='{number}']")


def test_tokens_are_coloured_by_level(page):
    go_to(page, "Explore")
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector("#tokens button")
    page.locator("#colour input").click()
    page.get_by_role("option", name="level 1").click()
    page.wait_for_selector("#tokens .msae-hue-1")
    shares = page.locator("#tokens button").evaluate_all(
        "(all) => all.map((one) => Number(one.style.getPropertyValue('--a')))"
    )
    assert shares[0] == 0
    assert 0 < max(shares) <= 1
    assert "of this level" in page.locator("#tokens button").nth(3).get_attribute("title")


def test_one_latents_page_after_the_other(page):
    go_to(page, "Explore")
    for number in (1, 40, 90, 200):
        page.locator("#latent-number :is(input, textarea)").fill(str(number))
        page.get_by_role("button", name="Open").click()
        page.wait_for_function(f"document.querySelector('#latent-page h2')?.textContent.includes('#{number} ')")


def test_the_tree_is_walked_down_and_up(page):
    go_to(page, "Tree")
    roots = page.locator("#tree .msae-latent")
    roots.first.or_(page.locator("#tree :text('No edge')")).wait_for()
    if roots.count() == 0:
        assert "No edge" in page.locator("#tree").inner_text()
        pytest.skip("the small SAE of this test has no edges")
    root = roots.first.get_attribute("data-id")
    roots.first.click()
    page.wait_for_selector("#tree h2")
    child = page.locator("#tree section", has=page.get_by_role("heading", name="More specific"))
    child = child.locator(".msae-latent").first
    number = child.get_attribute("data-id")
    child.click()
    page.wait_for_function(f"document.querySelector('#tree h2')?.textContent.includes('#{number} ')")
    assert page.locator("#tree .msae-crumbs button").count() == 3
    page.locator(f"#tree .msae-crumbs button[data-id='{root}']").last.click()
    page.wait_for_function(f"document.querySelector('#tree h2')?.textContent.includes('#{root} ')")
    page.locator("#tree").get_by_role("button", name="Steer with it").click()
    page.wait_for_selector(f"#dials input[data-id='{root}']")


def test_levels_follow_the_slider(page):
    go_to(page, "Levels")
    page.get_by_role("button", name="Measure").click()
    page.wait_for_selector("#levels-view tr[aria-current]")
    rows = page.locator("#levels-view table").first.locator("tbody tr")
    assert rows.count() == 3
    page.locator("#level input[type=range]").focus()
    page.keyboard.press("End")
    page.wait_for_selector("#levels-view tr[aria-current] th:text-is('2')")
    fve = [float(rows.nth(index).locator("td").nth(1).inner_text()) for index in range(3)]
    assert fve == sorted(fve)
    assert 0 < fve[0] < fve[2] <= 1
    assert "With level 2 · first 256 latents" in page.locator("#levels-view").inner_text()


def test_two_levels_are_compared(page):
    go_to(page, "Compare")  # which begins with an example
    page.wait_for_selector("#compare-view table")
    titles = page.locator("#compare-view h3").all_inner_texts()
    assert any("level 0" in title for title in titles)
    assert any("level 2" in title for title in titles)
    cells = page.locator("#compare-view table").evaluate_all(
        "(all) => all.map((one) => one.querySelector('tbody td').textContent)"
    )
    assert cells == ["32"]
    assert page.locator("#compare-view tbody tr").first.locator("td").all_inner_texts() == ["32", "256"]
    page.locator("#left-level input").click()
    page.get_by_role("option", name="level 1 · first 128").click()
    page.wait_for_selector("#compare-view h3:has-text('level 1')")
    number = page.locator("#compare-view button").first.get_attribute("data-id")
    page.locator("#compare-view button").first.click()
    page.wait_for_function(f"document.querySelector('#latent-page h2')?.textContent.includes('#{number} ')")


def test_refusals_are_told_and_harm_nothing(page):
    page.locator("#search :is(input, textarea)").fill("9999")
    page.locator("#search :is(input, textarea)").press("Enter")
    page.wait_for_selector("text=This SAE has latents 0 to 255")
    add_latent(page, 9)


def test_a_pasted_repo_opens_with_its_model(visit, hub, lm, tokenizer):
    lm.push_to_hub("tester/lm")
    tokenizer.push_to_hub("tester/lm")
    config = MatryoshkaSAEConfig(
        hidden_size=16, num_latents=64, prefix_sizes=[16, 64], k=4, site="layers.0", base_model="tester/lm"
    )
    MatryoshkaSAE(config).push_to_hub("tester/pasted")
    page = visit()
    add_latent(page, 200)
    box = page.locator("#source input")
    for wrong, words in (("tester/nothing", "no Hub repo tester/nothing"), ("/etc", "not the id of a Hub repo")):
        box.fill(wrong)
        box.press("Enter")
        page.wait_for_selector(f"text={words}")
    assert "256 latents" in page.locator("#status").inner_text(), "a refusal changed what is open"
    box.fill("tester/pasted")
    box.press("Enter")
    page.wait_for_selector("#status:has-text('64 latents in levels of 16, 64')")
    assert "tester/lm" in page.locator("#status").inner_text()
    page.wait_for_selector("#presets :text('no interpretation beside this SAE')")
    assert page.locator("#dials input").count() == 0, "a latent of another SAE stayed"
    page.wait_for_selector("#results button", state="detached")
    find(page, "40")
    page.locator("#results button[data-do='add'][data-id='40']").click()
    page.wait_for_selector("#dials input[data-id='40']")
    assert "× norm" in page.locator("#dials output").inner_text()
    default, _ = generate(page, "w1 w2 w3")
    assert default.startswith("w1 w2 w3")


# Everywhere


def test_markup_of_visitors_stays_text(page):
    default, steered = generate(page, EVIL)
    assert default.startswith(EVIL)
    assert steered.startswith(EVIL)
    go_to(page, "Explore")
    page.locator("#explore-text textarea").fill(EVIL)
    page.get_by_role("button", name="Read").click()
    page.wait_for_function("document.querySelector('#tokens').textContent.includes('onerror')")
    assert page.locator("#tokens img, #texts img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_tab_is_wider_than_a_phone(page, scheme):
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    page.locator("#presets button").first.click()
    page.wait_for_selector("#dials input")
    generate(page)
    for tab in TABS:
        go_to(page, tab)
        excess = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert excess <= 0, f"{tab} is {excess} pixels too wide"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", dark)[:3])) / 3
    assert brightness < 80 if scheme == "dark" else brightness > 180


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, scheme):
    """WCAG AA, 4.5 to 1, of the words that are our own against the page's background."""
    page.emulate_media(color_scheme=scheme)
    page.locator("#presets button").first.click()
    page.wait_for_selector("#dials input")
    generate(page)
    ratios = page.evaluate(
        """() => {
          const paint = (colour, under) => {
            const canvas = document.createElement('canvas');
            const brush = canvas.getContext('2d');
            for (const one of [under, colour]) { brush.fillStyle = one; brush.fillRect(0, 0, 1, 1); }
            return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const light = (rgb) => rgb.map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = getComputedStyle(document.body).backgroundColor;
          const found = {};
          for (const what of ['.msae-note', '.msae-measure', '.msae-prompt', '.msae-level', '.msae-name', 'output']) {
            const shown = [...document.querySelectorAll(what)].find((one) => one.offsetParent && one.textContent);
            if (!shown) continue;
            const [a, b] = [light(paint(getComputedStyle(shown).color, ground)), light(paint(ground, ground))];
            found[what] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }
          return found;
        }"""
    )
    assert len(ratios) >= 4
    assert min(ratios.values()) >= 4.5, ratios
