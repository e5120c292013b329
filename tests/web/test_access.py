"""Who may see and do what on the page: without a tokens file, without a token, and with one of each role."""

import pytest

from tests.web.stage import APPROVER, CODE, TOKENS

pytestmark = pytest.mark.e2e


def test_without_a_tokens_file_the_page_says_up_front_that_it_can_only_watch(switch, visit, word):
    sidecar = switch(with_tokens=False)
    page = visit(sidecar, None)
    word(page, "ALLOWED")
    notice = page.text_content("#readonly")
    refused = sidecar.operations("/api/v1/trigger", method="POST", body={"reason": "x"})
    assert refused.status == 403
    assert refused.document["detail"] in notice
    assert "can only watch" in notice
    assert "killswitch trigger" in notice
    assert not page.is_visible("#actions")
    assert not page.is_visible("#signin")
    sidecar.kill_switch("from the container")
    word(page, "BLOCKED")
    assert not page.is_visible("#recover")


def test_without_a_token_the_page_knows_nothing_and_it_keeps_none(switch, visit, word, sign_in):
    sidecar = switch()
    page = visit(sidecar, None)
    word(page, "NOT SIGNED IN")
    assert page.title() == f"NOT SIGNED IN · 127.0.0.1:{sidecar.operations_port} · killswitch"
    assert not page.is_visible("#known")
    assert not page.is_visible("#actions")
    sign_in(page, "no-such-token")
    page.wait_for_selector("#signin-why:text('this token is not known here')")
    word(page, "NOT SIGNED IN")
    sign_in(page, TOKENS["viewer"])
    word(page, "ALLOWED")
    assert page.text_content("#caller") == "signed in as vera"
    assert not page.is_visible("#stop")
    assert page.text_content("#signin-why") == "'vera' lacks the role operator. Another token may do more."

    sidecar.kill_switch("drill")
    word(page, "BLOCKED")
    sign_in(page, TOKENS["operator"])
    page.wait_for_selector("#caller:text('signed in as oscar')")
    page.wait_for_selector("#stop:not([hidden])")
    assert not page.is_visible("#recover")
    assert "'oscar' lacks the role risk" in page.text_content("#action-notes")
    sign_in(page, TOKENS["risk"])
    page.wait_for_selector("#recover:not([hidden])")
    assert not page.is_visible("#signin")

    kept = page.evaluate("() => JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])")
    assert kept == '["",{},{}]'
    assert TOKENS["risk"] not in page.content()
    assert page.input_value("#token") == ""
    page.reload()
    word(page, "NOT SIGNED IN")


def test_a_locked_out_approver_reads_how_long(switch, visit, word):
    sidecar = switch()
    sidecar.kill_switch("drill")
    for _ in range(5):
        sidecar.recover(code=f"{CODE}-not")
    page = visit(sidecar)
    word(page, "BLOCKED")
    page.click("#recover")
    page.fill("#recover-reason", "hope")
    page.fill("#recover-by", APPROVER)
    page.fill("#recover-code", CODE)
    with page.expect_response("**/api/v1/recovery") as answered:
        page.keyboard.press("Enter")
    page.wait_for_selector("#recover-dialog .refusal-detail")
    assert answered.value.status == 429
    said = page.text_content("#recover-dialog .refusal")
    assert answered.value.json()["detail"] in said
    assert f"Try again in {answered.value.headers['retry-after']} s." in said
    assert page.input_value("#recover-code") == ""


def test_the_api_tells_a_caller_what_it_may_do(switch):
    sidecar = switch(with_tokens=False)
    seen = sidecar.operations("/api/v1/access").document
    assert (seen["name"], seen["tokens"]) == (None, False)
    assert [seen[act]["allowed"] for act in ("read", "stop", "recover")] == [True, False, False]
    inside = sidecar.control("GET", "/api/v1/access").document
    assert [inside[act]["allowed"] for act in ("read", "stop", "recover")] == [True, True, True]
