// In: the page and its user. Out: a chat, its settings, the key, and the live numbers beside it.

import { Chat, shown } from "/web/chat.js";
import { Live } from "/web/live.js";
import { ask, useKey, wanting } from "/web/service.js";

const find = (selector) => document.querySelector(selector);
const root = document.documentElement;
const hint = find("#hint");
const words = find("#words");
let model = null; // its card

// -- settings ---------------------------------------------------------------------------------

const SEEDS = Number.MAX_SAFE_INTEGER;

function number(id, name) {
  const field = find(id);
  if (field.value === "" && !field.validity.badInput) return undefined;
  if (!field.validity.valid) {
    find("#settings").open = true;
    field.focus();
    throw new Error(`${name}: ${field.validationMessage}`);
  }
  return Number(field.value);
}

function seed() {
  const text = find("#seed").value.trim();
  if (text === "") return undefined;
  if (!/^\d+$/.test(text) || Number(text) > SEEDS) {
    find("#settings").open = true;
    find("#seed").focus();
    throw new Error(`Seed: a whole number from 0 to ${SEEDS}, or nothing`);
  }
  return Number(text);
}

function settings() {
  return {
    model: model.id,
    temperature: number("#temperature", "Temperature"),
    top_p: number("#top_p", "Top p"),
    max_tokens: number("#max_tokens", "Most tokens"),
    seed: seed(),
    system: find("#system").value.trim(),
  };
}

/** The settings in a few words beside their title. */
function tellSettings() {
  const value = (id) => find(id).value.trim();
  const parts = [
    value("#temperature") && `temperature ${value("#temperature")}`,
    value("#top_p") && `top p ${value("#top_p")}`,
    value("#max_tokens") && `${value("#max_tokens")} tokens`,
    value("#seed") ? `seed ${value("#seed")}` : "a new seed each time",
    value("#system") && "system prompt",
  ];
  find("#chosen").textContent = parts.filter(Boolean).join(" · ");
}

// -- the chat ---------------------------------------------------------------------------------

function trouble(text, isFull = false) {
  const line = find("#trouble");
  line.hidden = !text;
  line.textContent = isFull ? `The context is full; start a new chat. (${text})` : text;
}

const chat = new Chat(find("#log"), settings, {
  trouble,
  busy(is) {
    root.dataset.busy = is;
    find("#send").hidden = is;
    find("#stop").hidden = !is;
  },
  said(text) {
    find("#said").textContent = text;
  },
  /** Show how much of the context is used; whether all of it is. */
  used(tokens) {
    const room = model?.context_window ?? 0;
    find("#room").hidden = !tokens;
    find("#room-text").textContent = `${shown(tokens)} of ${shown(room)} tokens of context`;
    find("#room-bar").style.width = `${room ? Math.min(100, (100 * tokens) / room) : 0}%`;
    const isFull = tokens >= room;
    find("#room").classList.toggle("full", isFull);
    return isFull;
  },
  refused(text) {
    if (!words.value) words.value = text;
    if (!chat.turns.length) find("#log").replaceChildren(hint);
    fit();
  },
  seed(value) {
    find("#seed").value = value;
    tellSettings();
    find("#said").textContent = `The seed is now ${value}`;
  },
});

/** As many lines as the words take, where they can be seen. */
function fit() {
  if (words.offsetParent === null) return;
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight + 2}px`;
}

async function send(text) {
  if (chat.busy || !text.trim()) return;
  try {
    if (model === null) await introduce();
    settings();
  } catch (error) {
    trouble(error.message);
    return;
  }
  hint.remove();
  words.value = "";
  fit();
  await chat.send(text);
}

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send(words.value);
});
words.addEventListener("input", fit);
words.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(words.value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") chat.stop();
});
find("#stop").addEventListener("click", () => {
  chat.stop();
  words.focus();
});
find("#new").addEventListener("click", () => {
  chat.clear();
  find("#log").append(hint);
  words.focus();
});
hint.addEventListener("click", (event) => {
  if (event.target.matches("button")) send(event.target.textContent);
});
find("#settings").addEventListener("input", tellSettings);

// -- the service ------------------------------------------------------------------------------

/** Learn who answers. */
async function introduce() {
  const answer = await ask("/v1/models");
  [model] = (await answer.json()).data;
  document.title = `${model.id} · OpenLPU`;
  find("#model").textContent = model.id;
  const context = `context of ${shown(model.context_window)} tokens`;
  find("#about").textContent = `${context} · ${model.system_fingerprint}`;
  find("#about").title = "Equal fingerprints give equal bits";
}

wanting.addEventListener("key", () => {
  find("#key").hidden = false;
});
find("#key").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(find("#secret").value.trim());
  try {
    await introduce();
  } catch (error) {
    trouble(error.message);
    return;
  }
  find("#key").hidden = true;
  find("#secret").value = "";
  trouble("");
  live.awake();
  words.focus();
});

const live = new Live();
find("#view").addEventListener("click", () => {
  const isLive = root.dataset.view !== "live";
  root.dataset.view = isLive ? "live" : "chat";
  find("#view").setAttribute("aria-pressed", isLive);
  live.awake();
  fit();
});
addEventListener("resize", () => {
  live.awake();
  fit();
});

tellSettings();
fit();
chat.on.busy(false);
introduce().catch((error) => {
  if (error.status !== 401) trouble(error.message);
});
live.awake();
root.dataset.state = "ready";
