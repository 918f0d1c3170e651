"""In: a small service and Chromium. Out: the page at `/` chats, repeats, stops, says what is wrong,
and runs nothing that a model or a person wrote.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from browser import Browser, needs_chromium
from chat_page import IDLE, LAST, answer, choose, long_seed, say, slowed
from small_api import Api, roomy_model, serving_api
from small_service import bearer, until

import openlpu
from openlpu.serve.page import snapshot
from openlpu.serve.receipt import read_receipt, replay

ATTACKS = (
    "<img src=x onerror=\"document.title='owned'\">",
    "</div><script>document.title='owned'</script>",
    "**bold** [link](javascript:alert(1)) `code` <b>b</b> &lt;i&gt;",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving_api(model, tmp_path_factory.mktemp("data")) as running:
        yield running


# -- the files --------------------------------------------------------------------------------


def test_the_page_is_whole_and_asks_nobody_else(api: Api) -> None:
    page = api.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    files = {
        file.name: file.read_text() for file in (resources.files("openlpu.serve") / "web").iterdir()
    }
    assert page.text == files["index.html"]
    for name, text in files.items():
        told = api.get(f"/web/{name}")
        assert (told.status_code, told.text) == (200, text)
        policy = told.headers["content-security-policy"].split("; ")
        assert policy[:3] == ["default-src 'none'", "script-src 'self'", "style-src 'self'"]
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in str(policy)
        assert told.headers["x-content-type-options"] == "nosniff"
        for asked in re.findall(r'(?:from|href=|src=)\s*"([^"]+)"', text):
            assert asked.removeprefix("/web/") in files, asked
        foreign = re.findall(r"\w+://[^\s\"']+", text)
        assert set(foreign) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"\sstyle=|\son\w+=\"|localStorage|document\.cookie", text)


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/", "/web/..%2fpage.py", "/web/%00"])
def test_there_are_no_other_files(api: Api, path: str) -> None:
    refused = api.get(path)
    assert refused.status_code == 404
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


def test_the_openapi_page_does_not_list_it(api: Api) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path in ("/", "/stats") or path.startswith("/web")]
    assert "/v1/models" in paths


# -- the numbers ------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_service(api: Api) -> None:
    before = api.get("/stats").json()
    prompt = "How much is it? " * 12
    usage = [api.chat(prompt, seed=i, max_tokens=30).json()["usage"] for i in range(3)]
    now = api.get("/stats").json()
    grown = {name: now[name] - before[name] for name in now if name[-2:] != "_s" and name != "kv"}
    cached = [one["prompt_tokens_details"]["cached_tokens"] for one in usage]
    assert cached[1] == cached[2] > 0
    assert grown["answers"] == 3
    assert grown["prompt_tokens"] == sum(one["prompt_tokens"] for one in usage)
    assert grown["cached_tokens"] == sum(cached)
    assert grown["read_tokens"] == grown["prompt_tokens"] - grown["cached_tokens"]
    assert grown["generated_tokens"] == sum(one["completion_tokens"] for one in usage)
    assert grown["batch_sequences"] == pytest.approx(grown["steps"], abs=3)
    assert (now["running"], now["waiting"]) == (0, 0)
    assert 0 < now["token_s"] < now["first_token_s"] < 5
    assert now["kv"]["held"] == 0 < now["kv"]["kept"]
    assert f"lpu_generated_tokens_total {now['generated_tokens']}" in api.get("/metrics").text


def test_they_cost_next_to_nothing(api: Api) -> None:
    times_s = []
    for _ in range(200):
        began_s = time.perf_counter()
        snapshot(api.service)
        times_s.append(time.perf_counter() - began_s)
    # 0.1 ms when idle; the page asks twice a second.
    assert sorted(times_s)[100] < 0.002


def test_only_refusals_are_logged(api: Api) -> None:
    before = len(api.log.getvalue())
    api.get("/stats")
    api.get("/web/nothing.js")
    until(lambda: "/web/nothing.js" in api.log.getvalue()[before:])
    assert "/stats" not in api.log.getvalue()[before:]


def test_the_numbers_are_for_holders_of_a_key(model: openlpu.Model, tmp_path: Path) -> None:
    with serving_api(model, tmp_path) as api:
        assert api.service.keys is not None
        _, secret = api.service.keys.add("Ada")
        for path in ("/metrics", "/stats"):
            assert api.get(path).status_code == 401
            assert api.get(path, headers=bearer("lpu-wrong")).status_code == 401
            assert api.get(path, headers=bearer(secret)).status_code == 200
        assert api.get("/").status_code == api.get("/web/main.js").status_code == 200


# -- the chat ---------------------------------------------------------------------------------


@needs_chromium
def test_a_conversation_and_its_repetition(
    api: Api, model: openlpu.Model, browser: Browser
) -> None:
    browser.open(api.url)
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    assert "2,048 tokens" in browser.text("#about")
    choose(browser, "max_tokens", "60")
    choose(browser, "seed", "7")
    first = answer(browser, "Hello")
    figures = browser.text(f"{LAST} .meta")
    assert re.search(r"\d+ tokens? · [\d.,]+ tokens/s · first after \d+ ms", figures)
    assert "seed 7\n" in figures
    choose(browser, "system", "Be kind.")
    answer(browser, "Go on")
    assert browser.run("document.querySelectorAll('.turn').length") == 4
    assert "of 2,048 tokens of context" in browser.text("#room")
    # What was asked is what any client would ask.
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Go on"},
    ]
    browser.run(
        "window.saved = []; URL.createObjectURL = (blob) => {"
        "  saved.push(blob.text()); return 'data:,' };"
    )
    buttons = f"{LAST} .actions button"
    browser.run(f"[...document.querySelectorAll('{buttons}')].at(-1).id = 'receipt'")
    browser.click("#receipt")
    receipt = read_receipt(browser.run("saved[0]"))
    assert model.detokenize(receipt.answers[0].prompt).count("Be kind.") == 1
    assert [one.same for one in replay(model, receipt)] == [True]
    assert receipt.answers[0].sampling.seed == 7
    assert receipt.answers[0].logprobs == 0
    raw = browser.run("document.querySelectorAll('.turn.model .text')[0].textContent")
    messages[2]["content"] = raw
    body = {"messages": messages, "seed": 7, "max_tokens": 60, "temperature": 0.7, "top_p": 0.95}
    same = api.post("/v1/chat/completions", {"model": "tiny", **body}).json()
    text = browser.run(f"document.querySelector('{LAST} .text').textContent")
    assert same["choices"][0]["message"]["content"] == text
    # Repeated, with company.
    busy = [threading.Thread(target=api.chat, args=(f"Say {i}",)) for i in range(6)]
    for one in busy:
        one.start()
    browser.click(f"{LAST} .actions button:nth-child(2)")
    browser.until("document.querySelector('.verdict.same')")
    for one in busy:
        one.join()
    assert "and their log probabilities, bit for bit" in browser.text(".verdict")
    # Seeds are drawn anew unless one is given.
    choose(browser, "seed", "")
    browser.click("#new")
    browser.until("document.querySelectorAll('.turn').length === 0")
    for _ in range(2):
        answer(browser, "Hello")
    seeds = (
        "[...document.querySelectorAll('.actions button:first-child')].map((b) => b.textContent)"
    )
    assert len({"seed 7", *browser.run(seeds)}) == 3
    browser.click(f"{LAST} .actions button")
    assert browser.run("document.querySelector('#seed').value") != ""
    assert browser.console == []
    assert all(url.startswith((api.url, "data:")) for url in browser.requests)


@needs_chromium
def test_another_answer_is_called_another(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    choose(browser, "max_tokens", "40")
    answer(browser, "Hello")
    changed = """
    const real = window.fetch;
    window.fetch = (path, init) => {
      const body = JSON.parse(init.body ?? "null");
      if (body?.messages) body.seed += 1;
      return real(path, body ? { ...init, body: JSON.stringify(body) } : init);
    };
    """
    browser.run(changed)
    browser.click(f"{LAST} .actions button:nth-child(2)")
    browser.until("document.querySelector('.verdict.other')")
    assert browser.text(".verdict").startswith("Different from character ")
    assert browser.text(".text.other")


@needs_chromium
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_written_stays_text(api: Api, browser: Browser, attack: str) -> None:
    browser.open(api.url)
    # The model must say exactly that.
    browser.run(
        "const real = window.fetch; window.fetch = (path, init) => {"
        "  const body = JSON.parse(init.body ?? 'null');"
        f"  if (body?.messages) body.regex = {json.dumps(re.escape(attack))};"
        "  return real(path, body ? { ...init, body: JSON.stringify(body) } : init); };"
    )
    choose(browser, "system", attack)
    assert answer(browser, attack) == attack
    assert browser.text(".turn.user") == attack
    browser.click(f"{LAST} .actions button:nth-child(2)")
    browser.until("document.querySelector('.verdict.same')")
    assert browser.run("document.title") == "tiny · OpenLPU"
    assert browser.run("document.querySelectorAll('.log :is(img, script, b, a, code)').length") == 0
    assert browser.console == []


@needs_chromium
def test_the_policy_lets_nothing_else_run(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = \"owned\"';"
        "document.body.append(s); const i = document.createElement('img');"
        "i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    time.sleep(0.3)
    assert browser.run("document.title") != "owned"
    assert sum("Content Security Policy" in line for line in browser.console) == 2


@needs_chromium
def test_stopping_stops_the_service(
    api: Api, model: openlpu.Model, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = long_seed(api, "Go", max_tokens=200)
    slowed(model, monkeypatch)
    browser.open(api.url)
    choose(browser, "seed", str(seed))
    for way in ("Escape", "#stop"):
        browser.click("#new")
        say(browser, "Go")
        browser.until(f"document.querySelector('{LAST} .text')?.textContent.length > 5")
        assert api.worker.running == 1
        assert browser.run("document.querySelector('#send').hidden")
        if way == "Escape":
            browser.press("Escape")
        else:
            browser.click(way)
        browser.until(f"{IDLE} && document.querySelector('{LAST} .ended')")
        until(lambda: api.worker.running == 0)
        assert browser.text(f"{LAST} .ended") == "Stopped."
    # What there is of it is repeated, too, and the chat goes on.
    monkeypatch.undo()
    browser.click(f"{LAST} .actions button:nth-child(2)")
    browser.until("document.querySelector('.verdict.same')")
    assert "as far as both go" in browser.text(".verdict")
    choose(browser, "max_tokens", "20")
    assert answer(browser, "Go on")
    # A new chat ends the answer under way.
    slowed(model, monkeypatch)
    say(browser, "Go")
    until(lambda: api.worker.running == 1)
    browser.click("#new")
    until(lambda: api.worker.running == 0)
    browser.until(IDLE)
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    assert browser.console == []


@needs_chromium
def test_a_full_context_is_told(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    long = "x" * 3000
    say(browser, long)
    browser.until("!document.querySelector('#trouble').hidden")
    assert browser.text("#trouble").startswith("The context is full; start a new chat.")
    assert browser.run("document.querySelector('#words').value") == long
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    words = "x" * 1900
    choose(browser, "max_tokens", "")
    choose(browser, "seed", str(long_seed(api, words)))
    answer(browser, words)
    assert browser.text(f"{LAST} .ended") == "Cut: the context is full. Start a new chat."
    assert browser.run("document.querySelector('#room').classList.contains('full')")
    browser.click("#new")
    choose(browser, "max_tokens", "3")
    answer(browser, "Hi")
    assert browser.text(f"{LAST} .ended") == "Cut: the most tokens are reached."


@needs_chromium
@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("temperature", "-1", "Temperature: "),
        ("top_p", "1.5", "Top p: "),
        ("max_tokens", "0", "Most tokens: "),
        ("seed", "one", "Seed: a whole number"),
        ("seed", "99999999999999999", "Seed: a whole number"),
    ],
)
def test_odd_settings_are_told(
    api: Api, browser: Browser, field: str, value: str, part: str
) -> None:
    browser.open(api.url)
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    choose(browser, field, value)
    say(browser, "Hello")
    assert browser.text("#trouble").startswith(part)
    assert "\n" not in browser.text("#trouble")
    assert browser.run("document.activeElement.id") == field
    assert browser.run("document.querySelector('#words').value") == "Hello"


@needs_chromium
def test_keys(
    model: openlpu.Model, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_api(model, tmp_path) as api:
        assert api.service.keys is not None
        key, secret = api.service.keys.add("Ada")
        browser.open(api.url)
        browser.until("!document.querySelector('#key').hidden")
        assert browser.text("#pulse") == "wants a key"
        for word, part in (("lpu-wrong", "wrong or revoked"), (secret, "")):
            browser.write("#secret", word)
            browser.press("Enter")
            browser.until(f"document.querySelector('#trouble').textContent.includes('{part}')")
            if part:
                browser.until("!document.querySelector('#trouble').hidden")
        browser.until("document.querySelector('#key').hidden")
        browser.until("document.querySelector('#pulse').dataset.state === 'alive'")
        choose(browser, "max_tokens", "9")
        assert answer(browser, "Hello") is not None
        assert browser.run("Object.values(sessionStorage)") == [secret]
        assert browser.run("localStorage.length + document.cookie.length") == 0
        assert browser.run(f"document.documentElement.outerHTML.includes('{secret}')") is False
        # Revoked in the middle of an answer, and then before one.
        slowed(model, monkeypatch)
        choose(browser, "max_tokens", "400")
        say(browser, "Go on")
        browser.until(f"document.querySelector('{LAST} .text')?.textContent")
        api.service.keys.revoke(key.id)
        browser.until(f"{IDLE} && document.querySelector('{LAST} .ended')")
        assert browser.text(f"{LAST} .ended") == "Broken off."
        assert "revoked" in browser.text("#trouble")
        say(browser, "And now?")
        browser.until(f"{IDLE} && !document.querySelector('#key').hidden")
        assert "revoked" in browser.text("#trouble")
        assert browser.run("document.querySelector('#words').value") == "And now?"


@needs_chromium
def test_a_service_that_is_gone_is_told(
    model: openlpu.Model, browser: Browser, tmp_path: Path
) -> None:
    with serving_api(model, tmp_path) as api:
        browser.open(api.url)
        browser.until("document.querySelector('#pulse').dataset.state === 'alive'")
    browser.until("document.querySelector('#pulse').dataset.state === 'away'")
    say(browser, "Hello?")
    browser.until("!document.querySelector('#trouble').hidden")
    assert browser.text("#trouble") == "the service cannot be reached"
