"""The files of the web page: what they may contain, so that the policy of the page can stay as strict as it is."""

import re

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from sidecar.adapters.operations_http import OperationsServer
from sidecar.adapters.operations_http.headers import PAGE_POLICY
from sidecar.adapters.operations_http.page import INDEX, load
from sidecar.app.desk import STREAM_INTERVAL_SECONDS

FILES = load()
TEXTS = {name: file.body.decode() for name, file in FILES.items()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


class Nobody:
    """A desk that nothing is asked of."""

    def status(self):
        return {}


@pytest.fixture
async def origin():
    server = OperationsServer(desk=Nobody(), registry=CollectorRegistry())
    host, port = await server.start_tcp("127.0.0.1", 0)
    yield f"http://{host}:{port}"
    await server.stop()


async def test_every_file_is_served_as_what_it_is_and_never_cached(origin):
    async with aiohttp.ClientSession() as session:
        for name, file in FILES.items():
            path = "/" if name == INDEX else f"/page/{name}"
            async with session.get(origin + path) as response:
                assert response.status == 200
                assert await response.read() == file.body
                assert response.headers["Content-Type"] == f"{file.media_type}; charset=utf-8"
                assert response.headers["Cache-Control"] == "no-store"
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                if name == INDEX:
                    assert response.headers["Content-Security-Policy"] == PAGE_POLICY
        for path in ("/page/", f"/page/{INDEX}", "/page/..%2f__init__.py", "/page/nothing.js"):
            async with session.get(origin + path) as response:
                assert response.status == 404


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere():
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", TEXTS[INDEX])
    assert re.findall(r"<script([^>]*)>([^<]*)", TEXTS[INDEX]) == [(' type="module" src="page/main.js"', "")]
    for name, text in TEXTS.items():
        elsewhere = [url for url in re.findall(r"[a-z]+://[^\"'\s)]*", text) if url != "http://www.w3.org/2000/svg"]
        assert elsewhere == [], name
    assert "@import" not in TEXTS["page.css"]
    assert "url(" not in TEXTS["page.css"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_html_of_strings_or_keeps_anything(name):
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function",
        r"localStorage|sessionStorage|cookie|indexedDB",
    )
    assert not re.search("|".join(forbidden), SCRIPTS[name])


def test_every_element_that_a_script_asks_for_is_there_once():
    there = re.findall(r'\sid="([^"]+)"', TEXTS[INDEX])
    assert len(there) == len(set(there))
    wanted = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([^"$]+)"\)', text)}
    assert wanted <= set(there)
    labelled = re.findall(r'(?:for|aria-labelledby)="([^"]+)"', TEXTS[INDEX])
    assert set(labelled) <= set(there)


def test_the_page_expects_news_as_often_as_the_sidecar_sends_it():
    assert f"STREAM_PERIOD_MS = {STREAM_INTERVAL_SECONDS * 1000:g};" in SCRIPTS["feed.js"]


def test_every_import_of_a_script_is_a_file_of_the_page():
    for text in SCRIPTS.values():
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert name in FILES


def test_codes_and_tokens_are_typed_into_fields_that_hide_and_forget_them():
    for field in ("token", "recover-code", "approve-code"):
        tag = re.search(rf'<input id="{field}"[^>]*>', TEXTS[INDEX]).group()
        assert 'type="password"' in tag
        assert 'autocomplete="off"' in tag
