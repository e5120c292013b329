"""The page never shows what it does not know: silence, death, sleep, late news, answers that contradict themselves."""

import signal

import pytest

from tests.cast import free_port

pytestmark = pytest.mark.e2e

RECORD = """() => {
  window.words = [document.querySelector('#word').textContent];
  const note = () => window.words.push(document.querySelector('#word').textContent);
  const everything = {childList: true, characterData: true, subtree: true};
  new MutationObserver(note).observe(document.querySelector('#word'), everything);
}"""


def on_a_fixed_port():
    return {"listen": f"127.0.0.1:{free_port()}"}


def test_silence_is_disconnected_and_the_last_state_is_old(switch, visit, word):
    sidecar = switch()
    page = visit(sidecar)
    word(page, "ALLOWED")
    page.evaluate(RECORD)
    sidecar.signal(signal.SIGSTOP)
    word(page, "DISCONNECTED")
    assert page.title() == "DISCONNECTED · trading/bot-0 · killswitch"
    assert page.get_attribute("body", "data-verdict") == "unknown"
    assert "Do not trust this page" in page.text_content("#line")
    assert page.text_content("#urgent").startswith("DISCONNECTED. Do not trust this page")
    assert page.text_content("#because .last s") == "ALLOWED"
    assert page.get_attribute("#known", "class").split() == ["known", "old"]
    assert page.text_content("#link-text") == "disconnected, trying again"
    page.wait_for_function(
        "() => /[5-9] s ago/.test(document.querySelector('.last').textContent.replace(/\\u00a0/g, ' '))"
    )
    assert page.is_enabled("#stop")

    sidecar.signal(signal.SIGCONT)
    word(page, "ALLOWED")
    assert "old" not in page.get_attribute("#known", "class")
    # On waking the sidecar finds its own evaluation stale, and may say so before it allows again.
    assert page.evaluate("window.words")[:2] == ["ALLOWED", "DISCONNECTED"]


def test_a_stop_is_sent_while_the_stream_is_broken(switch, visit, word):
    sidecar = switch()
    page = visit(sidecar)
    word(page, "ALLOWED")
    sidecar.signal(signal.SIGSTOP)
    word(page, "DISCONNECTED")
    page.click("#stop")
    assert page.is_visible("#stop-dialog [data-when-down]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop-dialog .asking")
    sidecar.signal(signal.SIGCONT)
    word(page, "BLOCKED")
    assert sidecar.status()["causes"][0]["reason"] == "Emergency stop"


def test_a_sidecar_that_died_and_came_back_killed_is_never_shown_as_allowed(switch, visit, word, report):
    sidecar = switch(operations=on_a_fixed_port())
    page = visit(sidecar)
    word(page, "ALLOWED")
    page.evaluate(RECORD)
    sidecar.kill9()
    word(page, "DISCONNECTED")
    page.click("#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop-dialog .refusal-title:text('It is NOT KNOWN whether trading is stopped')")
    assert "stop the trading container" in page.text_content("#stop-dialog .refusal")
    page.click("#stop-dialog [data-close]")

    report(-0.2)
    sidecar.start()
    word(page, "BLOCKED")
    words = page.evaluate("window.words")
    assert words[:2] == ["ALLOWED", "DISCONNECTED"]
    assert set(words[2:]) <= {"NOT READY", "BLOCKED", "DISCONNECTED"}


def test_a_tab_that_slept_asks_anew_before_it_says_anything(switch, visit, word):
    page = visit(switch())
    word(page, "ALLOWED")
    page.evaluate(RECORD)
    # The clock of a machine that slept for an hour, while the stream's bytes waited in its buffers.
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 3600000; }")
    word(page, "DISCONNECTED")
    word(page, "ALLOWED")
    assert page.evaluate("window.words")[:2] == ["ALLOWED", "DISCONNECTED"]
    assert "(1 h" not in page.text_content("#since")  # reckoned by the sidecar's clock


ALLOW = {"decision": "allow", "reason": {"code": "active"}}
FINE = {"state": "ACTIVE", "mode": "active", "ready": True, "restriction": "none", "position_limit_factor": 1.0}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ({**FINE, "gate": ALLOW}, "allowed"),
        ({**FINE, "gate": ALLOW, "state": "KILLED"}, "unknown"),
        ({**FINE, "gate": ALLOW, "state": "SOMETHING"}, "unknown"),
        ({**FINE, "gate": ALLOW, "restriction": "halt"}, "unknown"),
        ({**FINE, "gate": ALLOW, "ready": None}, "unknown"),
        ({**FINE, "gate": ALLOW, "position_limit_factor": 0}, "unknown"),
        ({**FINE, "gate": ALLOW, "position_limit_factor": None}, "unknown"),
        ({**FINE, "gate": ALLOW, "position_limit_factor": 0.999}, "reduced"),
        ({**FINE, "gate": {}}, "unknown"),
        ({**FINE}, "unknown"),
        ({**FINE, "gate": {"decision": "deny", "reason": {"code": "stale"}}}, "blocked"),
        ({**FINE, "gate": {"decision": "deny", "reason": {"code": "unheard_of"}}}, "blocked"),
        ({**FINE, "gate": {"decision": "deny", "reason": {"code": "not_ready"}}}, "notready"),
        ({"state": "DISABLED", "gate": {"decision": "allow"}}, "disabled"),
        ({}, "unknown"),
    ],
)
def test_allowed_is_said_only_where_nothing_contradicts_it(files_alone, status, kind):
    ask = "async (status) => (await import('http://page.test/verdict.js')).verdictOf(status)"
    assert files_alone.evaluate(ask, status)["kind"] == kind


def test_news_that_arrives_late_is_no_news(files_alone):
    outcome = files_alone.evaluate(
        """async () => {
          const { Feed, SILENCE_MS } = await import('http://page.test/feed.js');
          const heard = [];
          const feed = new Feed({before: null, headers: null, onEvent: (name) => heard.push(name), onDown: null});
          const status = (age) => ({time: new Date(Date.now() - age).toISOString()});
          let slow = '', late = '';
          try { feed.take('status', status(0), {elapsed: 6000}); } catch (error) { slow = error.message; }
          feed.take('triggers', {}, {elapsed: 1});
          feed.take('status', status(0), {elapsed: 100});
          feed.take('triggers', {}, {elapsed: 100});
          try { feed.take('status', status(SILENCE_MS + 500), {elapsed: 100}); } catch (error) { late = error.message; }
          return {heard, slow, late};
        }"""
    )
    assert outcome["heard"] == ["status", "triggers"]
    assert "too slowly" in outcome["slow"]
    assert "too late" in outcome["late"]


@pytest.fixture(scope="module")
def files_alone(browser):
    """A page that has the scripts of the package and no sidecar."""
    from sidecar.adapters.operations_http.page import load

    files = load()
    page = browser.new_page()

    def serve(route):
        file = files.get(route.request.url.rsplit("/", 1)[1])
        route.fulfill(body=file.body if file else b"", content_type=file.media_type if file else "text/html")

    page.route("**/*", serve)
    page.goto("http://page.test/")
    yield page
    page.close()
