"""The page that checks proofs, in a real browser: what it accepts and refuses, and that nothing leaves it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from database import Database
from scripts import browser
from tests.browser.conftest import Page
from tests.harness import ROOT, Results, Service, vote, wait_until
from tests.integration.test_audit_log import count, prove, seal
from tests.verifier.documents import Document, Documents

SEED = int(os.environ.get("VERIFIER_SEED") or random.SystemRandom().randrange(10**6))
PAGE = ROOT / "web" / "verify.html"

CHECK = """
    document.getElementById('text').value = arguments[0];
    document.getElementById('seal').value = arguments[1];
    document.querySelector('button').click();
    return [document.body.className, document.getElementById('verdict').textContent];
"""


@pytest.fixture
def saved(page: Page, tmp_path: Path) -> Page:
    """The page as somebody has saved it to a disk, without a network."""
    file = tmp_path / "verify.html"
    file.write_bytes(PAGE.read_bytes())
    page.logs()
    page.requested()
    page.chromium.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.chromium.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.chromium.get(file.as_uri())
    return page


@pytest.fixture(autouse=True)
def _online_again(page: Page) -> object:
    yield
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.chromium.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def verdict(page: Page, document: Document, published: str | None = None) -> tuple[str, str]:
    kind, said = page.run(CHECK, document.json, document.published if published is None else published)
    return kind, said


def test_true_documents_are_accepted_and_altered_ones_refused_offline(saved: Page) -> None:
    """Each of more than forty, from a disk, and no request leaves the page."""
    print("VERIFIER_SEED =", SEED)
    documents = Documents(SEED)
    mixed = Documents(SEED, formats=(1, 1, 2, 3, 3))
    for true in (mixed.proof(), mixed.chain(), mixed.hashes()):
        assert verdict(saved, true)[0] == "good", true.name
    for true in (documents.proof(), documents.chain(), documents.hashes()):
        assert verdict(saved, true)[0] == "good", true.name
        kind, said = verdict(saved, true, "")
        assert (kind, documents.seals[-1].name() in said, "No published seal was given" in said) == ("good", True, True)
    typed = documents.published.upper()  # as somebody may copy it from paper
    assert verdict(saved, documents.proof(), f" {typed[:20]} {typed[20:]} ")[0] == "good"
    altered = documents.altered()
    assert len(altered) >= 40
    for document in altered:
        kind, said = verdict(saved, document)
        assert (kind, said[:9]) == ("bad", "Refused: "), document.name
    assert verdict(saved, documents.proof())[0] == "good"
    assert saved.requested() == {""}, "the file itself"
    assert saved.logs() == []


def test_it_agrees_with_the_other_checks_on_the_form_of_documents(saved: Page, tmp_path: Path) -> None:
    """What is made up as a whole so that all hashes fit, and files that are no JSON."""
    print("VERIFIER_SEED =", SEED)
    documents = Documents(SEED)
    verdicts = {document.name: verdict(saved, document) for document in documents.malformed()}
    assert {name: (kind, said[:9]) for name, (kind, said) in verdicts.items()} == dict.fromkeys(
        verdicts, ("bad", "Refused: ")
    )
    for document in documents.unusual():
        assert verdict(saved, document)[0] == "good", document.name
    for name, content in documents.no_json():
        file = tmp_path / "document.json"
        file.write_bytes(content)
        saved.run("document.body.className = ''")
        saved.chromium.find_element(By.ID, "file").send_keys(str(file))
        saved.chromium.find_element(By.CSS_SELECTOR, "button").click()
        wait_until(lambda: saved.run("return document.body.className"), "it has checked")
        assert saved.run("return document.body.className") == "bad", name
    assert saved.logs() == []


def test_what_is_no_proof_is_refused_in_words(saved: Page) -> None:
    """Whatever is pasted, nothing of it runs, and nothing goes wrong."""
    proof = Documents(1).proof()
    for text in (
        "",
        " ",
        "{",
        "7",
        "null",
        "[]",
        "{}",
        '"x"',
        '{"seals": []}',
        '{"seals": [null]}',
        '{"seals": [{}]}',
        '{"seals": 7}',
        '{"row": 7}',
        '{"row": "x", "seals": []}',
        "<img src=x onerror=alert(1)>",
        json.dumps(json.loads(proof.json) | {"path": "x"}),
        json.dumps(json.loads(proof.json) | {"seals": {}}),
    ):
        kind, said = verdict(saved, proof._replace(json=text))
        assert (kind, said[:9]) == ("bad", "Refused: "), text
    kind, said = verdict(saved, proof, "7:xyz")
    assert kind == "bad"
    assert "7:xyz is no seal" in said
    assert saved.logs() == []


def test_its_sha_256_is_that_of_the_browser(saved: Page) -> None:
    """For each length up to some blocks: it brings its own, since browsers have theirs on some origins only."""
    assert (
        saved.chromium.execute_async_script(
            "const done = arguments[0]; (async () => { const wrong = [];"
            "for (let n = 0; n < 300; n++) { const bytes = crypto.getRandomValues(new Uint8Array(n));"
            " const its = [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))];"
            " if (its.map(byte => byte.toString(16).padStart(2, '0')).join('') !== sha256(bytes)) wrong.push(n) }"
            " return wrong })().then(done, error => done(String(error)))"
        )
        == []
    )


def test_a_proof_of_a_real_log_is_accepted_from_a_file(
    page: Page,
    database: Database,
    results: Results,
    start_service: Callable[..., Service],
    tmp_path: Path,
    violations: Callable[[], list[str]],
) -> None:
    """On the page as the service serves it, by way of the results; the chain it publishes is, too."""
    ours = vote("law-1")
    count(database, vote("law-1"), ours, vote("law-2"))
    (made,) = seal(results)
    count(database, vote("law-2"))
    seal(results)
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(prove(results, ours["vote_id"])))
    service = start_service()
    page.open(service)
    wait_until(lambda: page.text("#seal").startswith("2:"), "the newest seal is there")
    page.chromium.find_element(By.CSS_SELECTOR, "#proof a[href^='verify']").click()
    wait_until(lambda: page.text("h1") == "Check a proof", "the page is there")
    assert violations() == []
    page.requested()
    page.chromium.find_element(By.ID, "seal").send_keys(made.name())
    page.chromium.find_element(By.ID, "file").send_keys(str(file))
    page.chromium.find_element(By.CSS_SELECTOR, "button").click()
    wait_until(lambda: "The proof holds" in page.text("#verdict"), "it has checked")
    assert f"{ours['vote_id']} (law-1, oui)" in page.text("#verdict")
    assert violations() == []
    assert page.requested() == set()
    chain = Document("the chain", "chain", service.get("/seals.json")[1], made.name())
    page.run("document.getElementById('file').value = ''")
    kind, said = verdict(page, chain)
    assert (kind, "whole, from seal 1 to seal 2" in said) == ("good", True)
    # what it may not do, the browser refuses
    blocked = "return fetch('/results.json').then(() => 'sent', () => 'refused')"
    assert page.run(blocked) == "refused"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_read_the_verdict(page: Page, violations: Callable[[], list[str]], theme: str) -> None:
    """On the smallest phone and in both themes: contrast, names, and nothing sticks out."""
    browser.show_as(page.chromium, 320, 700, theme, "reduce")
    page.chromium.get(PAGE.as_uri())
    proof = Documents(SEED).proof()
    for published, kind in (("", "good"), (proof.published, "good"), (f"7:{'0' * 64}", "bad")):
        assert verdict(page, proof, published)[0] == kind
        assert page.run("return document.documentElement.scrollWidth") == 320
        assert violations() == []


def test_the_page_speaks_french(french_page: Page) -> None:
    """All of it."""
    french_page.chromium.get(PAGE.as_uri())
    assert french_page.text("h1") == "Vérifier une preuve"
    kind, said = french_page.run(CHECK, Documents(1).proof().json, "")
    assert (kind, said[:16]) == ("good", "La preuve tient\u00a0")
    english = french_page.run(
        "return Object.keys({...TEXTS.en, ...TEXTS.fr}).filter(name => typeof TEXTS.en[name] !== typeof TEXTS.fr[name])"
    )
    assert english == []
