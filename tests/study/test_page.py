"""The page of a study as a reader has it: in Chromium, on light and dark, on a phone, on paper, with hostile names."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from chromium import launched, pixels
from markupsafe import Markup
from matplotlib.figure import Figure
from study_world import SHAPE, inputs_of, scores

from mergekit_wp import page as page_module
from mergekit_wp.page import figure, frame, grid, section
from mergekit_wp.pictures import legend_above
from mergekit_wp.scores import Scores, TaskScores
from mergekit_wp.study import drawings, maps, parts
from mergekit_wp.study.parts import QUESTIONS, Answer, Note, Part, PartResult, write_page, write_part

HOSTILE = """</script><img src=x onerror="owned=1">'`${owned=1}"""
TASKS = ("b", HOSTILE)
WORD = f"␣{HOSTILE}"
TABLE = [["task", "scores", "component", "score"]] + [
    [task, "kl", name, score]
    for task in TASKS
    for name, score in (("L0N7", "0.50 (0.1 to 0.9)"), ("L3N10", "-"), ("L2N9", "-0.2"), ("L1N8", "10"))
]


def _said(*_: object) -> PartResult:
    """What another part would say: every question answered, a table, marks, and words of a component."""
    rows = [("L0H1", 0.5, 0.25, 0.75), ("L1N8", 0.25, -0.5, 1.0)]
    picture = drawings.intervals(rows, "score", "leaders")
    body = figure(f"Leaders of {HOSTILE}", picture, "said-leaders", HOSTILE, "kl") + grid(TABLE)
    answers = {question: Answer(f"{question} {HOSTILE}", "leaders") for question in QUESTIONS}
    notes = [Note("L0H1", "kl", task, f"writes {WORD}") for task in TASKS]
    return PartResult({}, {}, {"leaders": picture}, body, answers=answers, notes=notes, headline=f"Also {HOSTILE}")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = scores(tasks=TASKS)
    heads_LH = torch.zeros(SHAPE.layers, SHAPE.heads)
    heads_LH[0, 1] = 0.5
    own = TaskScores(heads_LH, found.tasks[HOSTILE].neurons, None)
    files = {"kl": Scores.from_tasks(found.meta, {"b": found.tasks["b"], HOSTILE: own})}
    inputs, module = inputs_of(files), ModuleType("said_part")
    module.PART = Part("said", "Said", _said, (), models=False, code=())  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "said_part", module)
        patched.setattr(parts, "PARTS", {"maps": parts.PARTS["maps"], "said": "said_part"})
        for part in (maps.PART, module.PART):
            key = parts.made_of(part, inputs.study, inputs)
            write_part(part, folder, key, part.work(inputs.study, inputs, lambda *_: lambda _: None))
        write_page(folder, inputs.study, inputs)
    return folder / parts.PAGE


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; nothing may have been asked for but itself, and no foreign text run, when a test ends."""
    contexts = []

    def load(width: int = 1000, **how: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **how))
        page = contexts[-1].new_page()
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.goto(page_file.as_uri())
        return page

    yield load
    for context in contexts:
        for page in context.pages:
            assert page.asked == [page_file.as_uri()]
            assert page.complaints == []
            assert page.evaluate("window.owned") is None
        context.close()


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`, 0 to 255."""
    return float(np.mean([float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]))


def style(page: Any, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate("(e, name) => getComputedStyle(e)[name]", name)


def test_light_and_dark(opened: Callable[..., Any]) -> None:
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        page.locator("#maps .cells").first.scroll_into_view_if_needed()
        screen = pixels(page).astype(int)
        assert len(np.unique(screen @ (1 << 16, 1 << 8, 1))) > 50, "blank"
        ground, text = np.median(screen[::8, ::8], axis=(0, 1)), style(page, "figure svg text", "fill")
        assert (ground.mean() > 200) == (scheme == "light")
        assert (ground.mean() < 60) == (scheme == "dark")
        assert abs(ground.mean() - brightness(text)) > 120, "text of pictures can be read"
        # A cell of score 0 is the page itself, the largest one a colour.
        own = page.locator("#maps figure", has=page.locator("[data-says='L0H1: 0.5']"))
        own.scroll_into_view_if_needed()
        screen, found = pixels(page).astype(int), {}
        for says in ("L3H3: 0", "L0H1: 0.5"):
            box = own.locator(f"[data-says='{says}']").bounding_box()
            found[says] = screen[int(box["y"] + box["height"] / 2), int(box["x"] + box["width"] / 2)]
        assert np.abs(found["L3H3: 0"] - ground).max() < 12
        assert np.abs(found["L0H1: 0.5"] - ground).max() > 80


def test_a_phone_scrolls_one_way(opened: Callable[..., Any]) -> None:
    page = opened(390, has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#said table button").first.is_visible(), "what sorts a table is there"
        box = page.locator("#maps-neurons-kl svg").bounding_box()
        assert box["width"] > 0.65 * 691, "a wide picture is no stamp"


def test_paper_is_white(opened: Callable[..., Any]) -> None:
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert brightness(style(page, "body", "backgroundColor")) == 255
    assert brightness(style(page, "h1", "color")) < 60
    assert brightness(style(page, "figure svg text", "fill")) < 60
    assert not page.locator(".bar").is_visible()


def test_the_five_answers_lead_to_their_pictures(opened: Callable[..., Any]) -> None:
    page = opened()
    answers = page.locator(".answers dd")
    assert answers.count() == len(QUESTIONS) == 5
    assert answers.nth(1).inner_text() == f"where {HOSTILE} See it"
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.getAttribute('href'))")
    assert all(page.locator(f"[id='{target[1:]}']").count() == 1 for target in targets)
    answers.nth(0).locator("a").click()
    top = page.locator("#said-leaders").bounding_box()["y"]
    assert page.locator(".bar").bounding_box()["height"] <= top < 800, "not below the bar"


def test_a_table_is_sorted_by_a_click(opened: Callable[..., Any]) -> None:
    page = opened()

    def column(number: int) -> list[str]:
        return page.locator(f"#said tbody tr > :nth-child({number})").all_inner_texts()

    heads = page.locator("#said thead th")
    before = column(4)
    heads.nth(3).locator("button").click()
    assert heads.nth(3).get_attribute("aria-sort") == "descending"
    assert column(4) == ["10", "10", "0.50 (0.1 to 0.9)", "0.50 (0.1 to 0.9)", "-0.2", "-0.2", "-", "-"]
    heads.nth(3).locator("button").click()
    assert heads.nth(3).get_attribute("aria-sort") == "ascending"
    assert column(4)[:2] == ["-0.2", "-0.2"]
    assert column(4)[-2:] == ["-", "-"], "what is not known is last either way"
    heads.nth(2).locator("button").click()
    assert column(3)[::2] == ["L0N7", "L1N8", "L2N9", "L3N10"], "words from A, numbers in them by value"
    assert heads.nth(3).get_attribute("aria-sort") is None
    assert sorted(column(4)) == sorted(before)


def test_one_task_alone(opened: Callable[..., Any]) -> None:
    page = opened()

    def seen() -> dict[str, int]:
        places = {"rows": "#said tbody tr", **{task: f"figure[data-task={json.dumps(task)}]" for task in TASKS}}
        return {name: page.locator(place).filter(visible=True).count() for name, place in places.items()}

    everything = {"rows": 8, "b": 1, HOSTILE: 2}
    assert seen() == everything
    assert page.locator("#task option").all_inner_texts() == ["all tasks", *TASKS]
    page.select_option("#task", "b")
    assert seen() == {"rows": 4, "b": 1, HOSTILE: 0}
    panels = page.locator("svg g[data-task]")
    pale = {each.get_attribute("data-task"): "pale" in (each.get_attribute("class") or "") for each in panels.all()}
    assert pale == {"b": False, HOSTILE: True}
    page.select_option("#task", HOSTILE)
    assert seen() == {"rows": 4, "b": 0, HOSTILE: 2}
    page.select_option("#task", "")
    assert seen() == everything


def test_the_pointer_names_a_component(opened: Callable[..., Any]) -> None:
    page = opened()
    tip = page.locator(".tip")
    assert not tip.is_visible()
    page.locator(f"figure[data-task={json.dumps(HOSTILE)}] [data-says^='L0H1']").first.hover()
    assert tip.locator("strong").inner_text() == "L0H1: 0.5"
    assert tip.locator("span").all_inner_texts() == ["score 0.5, number 1 of the heads", f"writes {WORD}"]
    assert tip.locator("img").count() == 0
    page.locator("h1").hover()
    assert not tip.is_visible()
    page.locator("#said-leaders .mark").first.hover()
    assert tip.locator("strong").inner_text() == "L0H1: 0.5 (0.25 to 0.75)"
    assert f"writes {WORD}" in tip.inner_text()
    page.locator("#said tbody td", has_text="L1N8").first.hover()
    assert tip.locator("strong").inner_text() == "L1N8"


def test_a_finger_names_a_component(opened: Callable[..., Any]) -> None:
    page = opened(390, has_touch=True, is_mobile=True)
    page.locator("#said-leaders .mark").first.tap()
    tip = page.locator(".tip")
    assert f"writes {WORD}" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.locator("h2").first.tap()
    assert not tip.is_visible()


def test_without_scripts_it_is_read(opened: Callable[..., Any]) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(".bar").count() == 0
    assert page.locator("#said tbody tr").filter(visible=True).count() == 8
    assert page.locator(".answers dd").filter(visible=True).count() == 5


class _Counting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_page_forbids_requests_and_other_scripts(browser: Any, tmp_path: Path) -> None:
    """By its own policy, beside the escaping of all text: with a hole in that, nothing would run or leave."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Counting)
    server.asked = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    attack = f"<script>window.owned=1</script><img src='{there}/image' onerror='window.owned=1'>"
    holed = frame("t", "", section("s", "") + Markup(attack), data={"files": [], "tasks": [], "notes": {}})
    without = re.sub("<meta http-equiv=.*", "", holed)
    for text, owned, answer, asked in ((holed, None, "TypeError", set()), (without, 1, "sent", {"/image", "/fetch"})):
        (tmp_path / "holed.html").write_text(text)
        page = browser.new_page()
        page.goto((tmp_path / "holed.html").as_uri())
        assert page.locator("html.scripted").count() == 1, "ours runs"
        assert page.evaluate("window.owned") == owned
        send = f"fetch('{there}/fetch', {{ mode: 'no-cors' }}).then(() => 'sent', (error) => error.name)"
        assert page.evaluate(send) == answer
        assert set(server.asked) == asked  # type: ignore[attr-defined]
        page.close()
    server.shutdown()
    server.server_close()


def test_a_legend_is_as_wide_as_its_picture_at_most() -> None:
    labels = ["random", "random, as many a layer", "worst of the ranking", "top of the ranking"]
    found = {}
    for width in (4.4, 6.6, 20):
        figure = Figure(figsize=(width, 3), layout="constrained", dpi=72)
        lines = [figure.subplots().plot([0, 1], label=label)[0] for label in labels]
        legend_above(figure, lines, labels)
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width
        found[width] = legend._ncols
    assert 1 <= found[4.4] <= found[6.6] < found[20] == 4


def test_no_text_in_a_template_has_a_line_break() -> None:
    """What is no markup is shown with its control characters as escapes, and so would that be."""
    found = 0
    for file in (Path(page_module.__file__).parent / "templates").glob("*.html"):
        for block in re.findall(r"\{\{.*?\}\}", file.read_text(), re.DOTALL):
            texts = re.findall(r'"[^"]*"', block)
            assert not [text for text in texts if "\n" in text], file.name
            found += len(texts)
    assert found > 10
