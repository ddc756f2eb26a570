"""Pages in a browser: what a reader sees, hovers, types and prints; and that the data's own script never ran."""

import itertools

import numpy as np
import pytest

from crossattention.views.pages import (
    AttentionLayer,
    AttentionView,
    FeedForwardView,
    KeyInput,
    LongSide,
    MemoryKey,
    MemoryLayer,
    TextSide,
    write_page,
)
from view_samples import HOSTILE, hostile_view, large_view, long_view, memory_view, picture_view, sound_view, text_view

pytestmark = pytest.mark.browser

VIEWS = {
    "text": text_view,
    "hostile": hostile_view,
    "picture": picture_view,
    "sound": sound_view,
    "long": long_view,
    "memory": memory_view,
}
READOUT = "document.getElementById('readout').textContent"


@pytest.fixture
def show(browser, tmp_path):
    """Write a view, open it, and give the browser."""

    def shown(view, fragment="", **how):
        browser.open(write_page(view, tmp_path / "page.html"), fragment=fragment, **how)
        return browser

    return shown


def centre(browser, selector):
    """The middle of the first element that a selector finds, after it is scrolled to the middle of the window."""
    box = "const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"
    return browser.evaluate(
        f"(found => {{ found.scrollIntoView({{block: 'center'}}); {box} }})(document.querySelector({selector!r}))"
    )


@pytest.mark.parametrize("kind", VIEWS)
def test_a_page_opens_from_disk_alone_without_complaint_and_none_of_the_data_s_script_runs(kind, show):
    browser = show(VIEWS[kind]())
    assert browser.complaints == []
    assert [url.split("/")[-1] for url in browser.requests] == ["page.html"]
    assert browser.evaluate("'pwned' in window") is False
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("document.querySelectorAll('main section').length") >= 2


def test_a_script_put_into_the_page_would_not_run(show):
    """What the test above relies on: the policy refuses, and the refusal is seen."""
    browser = show(text_view())
    browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s); })()"
    )
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')")
    browser.settle()
    assert browser.evaluate("'pwned' in window") is False
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_hostile_texts_are_shown_as_they_are(show):
    browser = show(hostile_view())
    labels = browser.evaluate("[...document.querySelectorAll('.queries .token .text')].map(e => e.textContent)")
    assert labels[0] == HOSTILE[0]
    assert labels[1] == HOSTILE[1]
    assert labels[7] == "⟦U+202E⟧right to left"
    assert labels[11] == "␀␛[31m␊␉"
    assert labels[9].startswith("xxx") and labels[9].endswith("…")
    assert browser.evaluate("document.querySelector('h1').textContent").startswith("</title><script>")
    assert browser.evaluate("document.querySelectorAll('.token b, .token img, h1 script').length") == 0
    assert browser.evaluate("getComputedStyle(document.querySelector('.token .text')).unicodeBidi") == "isolate"


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_stands_out_of_the_page(kind, width, show):
    browser = show(VIEWS[kind](), width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_hovering_a_query_tells_what_it_reads_and_a_position_who_reads_it(show):
    view = text_view()
    browser = show(view)
    mean = np.mean([layer.weights.mean(0) for layer in view.layers], 0)
    browser.move(*centre(browser, ".queries .token"))
    best = int(mean[0].argmax())
    assert f"query 0 “S” reads “{'serif'[best]}”: {mean[0, best]:.3f}" in browser.evaluate(READOUT)
    numbers = browser.evaluate("[...document.querySelectorAll('.ribbons .context .number')].map(e => e.textContent)")
    assert [float(number) for number in numbers] == pytest.approx(mean[0], rel=1e-2)
    browser.move(*centre(browser, ".ribbons .context .token"))
    received = browser.evaluate(READOUT).split("position 0 “s” receives ")[1].split(" in sum")[0]
    assert float(received) == pytest.approx(mean[:, 0].sum(), rel=1e-2)


def test_the_table_has_the_numbers_of_the_chosen_head(show):
    view = text_view()
    browser = show(view, fragment="#layer=1&head=2&query=1")
    cells = "row => [...row.cells].slice(0, 3).map(cell => cell.textContent)"
    found = browser.evaluate(f"[...document.querySelectorAll('caption + thead + tbody tr')].map({cells})")
    weights = view.layers[1].weights[2, 1]
    order = np.argsort(-weights)
    assert [int(position) for position, _, _ in found] == order.tolist()
    assert [float(weight) for _, _, weight in found] == pytest.approx(weights[order], rel=1e-2)
    assert "decoder.1, head 2" in browser.evaluate(READOUT)


def test_keys_choose_layers_heads_queries_and_search(show):
    browser = show(text_view())
    browser.press("l", "h", "h")
    assert "decoder.0, head 1" in browser.evaluate(READOUT)
    browser.press("ArrowDown", "ArrowDown")
    assert "query 1 “EH” reads" in browser.evaluate(READOUT)
    browser.press("ArrowRight")
    assert "position 0 “s” receives" in browser.evaluate(READOUT)
    browser.press("Escape", "/", "e", "Enter")
    assert "(2 found)" in browser.evaluate("document.getElementById('tools').textContent")
    assert "position 1 “e” receives" in browser.evaluate(READOUT)
    browser.press("Escape")
    assert "the largest weight is" in browser.evaluate(READOUT)


@pytest.mark.parametrize("start", [pytest.param({}, marks=pytest.mark.slow), {"layer": 1, "head": 2}], ids=str)
@pytest.mark.parametrize(("layer", "head"), [(-1, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((-1, -1), (1, -1)))])
def test_what_is_chosen_can_be_sent_by_its_address(start, layer, head, browser, tmp_path):
    """Means too, also where the page was made to start with a layer and a head."""
    path = write_page(text_view(), tmp_path / "page.html", **start)
    browser.open(path)
    browser.evaluate(f"crossattentionPage.choose({layer}, {head}), crossattentionPage.draw()")
    told = browser.evaluate(READOUT)
    browser.open(path, fragment=browser.evaluate("location.hash"))
    assert browser.evaluate(READOUT) == told
    assert browser.evaluate("[crossattentionPage.state.layer, crossattentionPage.state.head]") == [layer, head]


def test_a_long_text_is_cut_between_characters_and_not_within_one(show):
    labels = tuple("x" * at + "🎉" * 5_000 for at in range(2))
    layer = AttentionLayer.of_weights("layer", "cross-attention", [[[0.5, 0.5]]])
    browser = show(AttentionView("a title", TextSide(("a",)), TextSide(labels), (layer,)))
    shown = browser.evaluate("[...document.querySelectorAll('.context .token .text')].map(e => [e.textContent, e.title])")
    about = browser.evaluate("document.getElementById('about').textContent")
    assert about == "1 query on 2 positions in 1 layer with 1 head (cross-attention)."
    lone = browser.evaluate("[...document.querySelectorAll('body *')].filter(e => !e.textContent.isWellFormed()).length")
    assert lone == 0 and len(shown) >= 2 and all(part.endswith("🎉…") for parts in shown for part in parts)


def test_an_address_that_names_nothing_is_passed_over(show):
    browser = show(text_view(), fragment="#layer=99&head=-3&query=<script>&position=1e9")
    assert browser.complaints == []
    assert "mean of 2 layers" in browser.evaluate(READOUT)


def test_a_word_lights_the_patch_that_it_reads_in_its_place(show):
    browser = show(picture_view(), fragment="#query=2")
    assert browser.evaluate("crossattentionPage.panels[1].image.complete") is True
    canvas = "crossattentionPage.panels[1].canvas"
    pixels = f"(at => [...{canvas}.getContext('2d').getImageData(...at({canvas}), 1, 1).data])"
    light = browser.evaluate(f"{pixels}(c => [c.width - 12, c.height - 12])")
    dark = browser.evaluate(f"{pixels}(c => [12, 12])")
    assert light[0] > 200 > 60 > dark[0]
    assert "row 5, column 7: 0.750" in browser.evaluate(READOUT)
    assert "row 5, column 7, 0.750" in browser.evaluate("crossattentionPage.panels[1].canvas.getAttribute('aria-label')")


def test_a_letter_names_the_time_that_it_reads_and_the_sound_can_be_played(show):
    browser = show(sound_view(), fragment="#query=1")
    is_ready = "const a = document.querySelector('audio'); a.readyState ? done() : a.addEventListener('loadedmetadata', done);"
    browser.evaluate(f"new Promise(done => {{ {is_ready} }})")
    assert browser.evaluate("document.querySelector('audio').duration") == pytest.approx(0.8, abs=0.01)
    buttons = browser.evaluate("[...document.querySelectorAll('button.plain')].map(b => b.textContent)")
    assert buttons == ["▶ 0.20\u20130.28 s: 0.800"]
    letters = browser.evaluate("crossattentionPage.panels.find((panel) => panel.placed).placed")
    assert letters[1] == ["b", pytest.approx(0.21)]  # over the first of the spans that it reads most
    assert browser.complaints == []


def test_strips_go_from_50_000_positions_down_to_one(show):
    browser = show(long_view())
    strips = browser.evaluate("[...document.querySelectorAll('.strip')].map(s => [s.level.first, s.level.length, s.level.size])")
    assert strips[0] == [0, 50_000, 782]
    assert strips[-1][2] == 1
    for (first, length, _), (inner, inner_length, _) in itertools.pairwise(strips):
        assert first <= inner and inner + inner_length <= first + length
    last = strips[-1]
    assert last[0] <= 31_415 < last[0] + last[1]
    above = browser.evaluate("[...document.querySelectorAll('.strip')].at(-1).textContent")
    assert above.startswith("one position a cell; the tallest, position 31,415 “here”, is 1.0")
    browser.press("/", *"seven", "Enter")
    assert "position 7 “seven” receives" in browser.evaluate(READOUT)
    assert browser.evaluate("document.querySelectorAll('.strip')[2].level.first") == 0


def test_fifty_thousand_queries_are_drawn_in_a_matrix_that_a_page_can_hold(show):
    """Of 50,000 rows the last ones alone read the last column: they are seen, and found by the mouse."""
    n, m = 50_000, 4
    weights = np.zeros((1, n, m), np.float32)
    weights[:, :, 0] = 0.25
    weights[:, -40:] = [0, 0, 0, 1]
    layer = AttentionLayer.of_weights("decoder", "cross-attention", weights, k=1)
    browser = show(AttentionView("pixels read latents", LongSide(n), LongSide(m), (layer,)))
    canvas = "crossattentionPage.panels.find((panel) => panel.cellHeight).canvas"
    assert browser.complaints == [] and browser.evaluate(f"{canvas}.height") < 1500
    pixels = f"(at => [...{canvas}.getContext('2d').getImageData(...at({canvas}), 1, 1).data])"
    dark, light = (browser.evaluate(f"{pixels}(c => [c.width - 8, c.height - {up}])") for up in (3, 40))
    assert sum(dark[:3]) < 200 < 700 < sum(light[:3])
    assert "Each pixel is the largest of about 36 rows." in browser.evaluate("document.getElementById('panels').textContent")
    browser.evaluate(f"{canvas}.scrollIntoView({{block: 'end'}})")
    x, y = browser.evaluate(f"(box => [box.right - 8, box.bottom - 3])({canvas}.getBoundingClientRect())")
    browser.move(x, y)
    assert "query 49,9" in browser.evaluate(READOUT) and "reads position 3 with 1.00" in browser.evaluate(READOUT)


def test_a_page_of_26_layers_opens_within_two_seconds_and_changes_head_at_once(show, browser, tmp_path):
    path = write_page(large_view(), tmp_path / "large.html")
    browser.open(path)
    assert 0.0 < browser.busy_seconds < 2.0  # of a processor, so that a busy machine does not decide
    assert browser.complaints == []
    before = browser.busy_seconds
    browser.evaluate("crossattentionPage.choose(17, 3); crossattentionPage.draw();")
    assert browser.busy_seconds - before < 0.5
    assert "model.decoder.layers.17, head 3" in browser.evaluate(READOUT)


def test_memory_shows_the_keys_of_the_chosen_token(show):
    view = memory_view()
    browser = show(view)
    keys = "[...document.querySelectorAll('.card h3')].map(e => e.textContent)"
    for token, layer in ((0, 1), (1, 1), (1, 0)):
        expected = [
            f"Key {key}fires {value:.3g}"
            for key, value in zip(view.layers[layer].top_keys[token], view.layers[layer].coefficients[token], strict=True)
            if value > 0
        ]
        found = browser.evaluate(keys)
        assert [label.split("fires")[0] for label in found] == [label.split("fires")[0] for label in expected]
        browser.press("ArrowRight" if token == 0 else "L")
    assert browser.evaluate("document.querySelector('.card mark').textContent") in {"K", "AE", "T"}


@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_the_token_that_a_key_fires_on_is_seen_in_a_long_text(width, show):
    long = MemoryKey((("S", 1.0),), (KeyInput(("misconstrued",) * 6 + ("here",), 6, 1.5, "extraterrestrial"),))
    layer = MemoryLayer("ff", 1, [[0]], [[1.0]], [1], {0: long})
    browser = show(FeedForwardView("long", TextSide(("S",)), (layer,)), width=width)
    box = "document.querySelector('.card mark').getBoundingClientRect()"
    words, card = (f"document.querySelector('.card{part}').getBoundingClientRect()" for part in (" .words", ""))
    assert browser.evaluate(
        f"{box}.right <= {words}.right + 1 && {words}.right <= {card}.right && {box}.bottom <= {words}.bottom + 2"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_on_their_ground(scheme, show):
    """The contrast of each text colour with the paper, as WCAG 2 defines it: at least 4.5."""
    browser = show(text_view(), scheme=scheme)
    value = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
    colours = browser.evaluate(f"['--paper', '--ink', '--quiet', '--accent', '--mark'].map({value})")
    paper, *inks = map(luminance, colours)
    for ink in inks:
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_in_print_the_page_is_dark_on_light_without_its_tools(show, tmp_path):
    browser = show(text_view(), scheme="dark")
    browser.emulate("dark", media="print")
    browser.settle()
    assert browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") in {"#fff", "#ffffff"}
    assert browser.evaluate("getComputedStyle(document.getElementById('tools')).display") == "none"
    assert browser.print(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
