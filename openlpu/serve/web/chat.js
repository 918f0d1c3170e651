// In: what people type. Out: the conversation, told and shown. All text enters the page as text.

import { Completion, compared, drawnSeed } from "/web/completion.js";
import { Refusal } from "/web/service.js";

const NEAR_END_PX = 80;

export function made(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

export const shown = (number, digits = 0) =>
  number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

const inTime = (ms) => (ms < 1000 ? `${shown(ms)} ms` : `${shown(ms / 1000, 1)} s`);

export class Chat {
  /** log: where turns are put. settings(): the request's other fields. on: busy(is), trouble(text),
   * said(text), used(tokens), refused(words), seed(seed). */
  constructor(log, settings, on) {
    this.log = log;
    this.settings = settings;
    this.on = on;
    this.turns = [];
    this.running = null;
    this.follows = true; // whether the end is in sight, and stays so
    log.addEventListener("scroll", () => {
      this.follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    });
    new ResizeObserver(() => this.follow()).observe(log);
  }

  follow() {
    if (this.follows) this.log.scrollTop = this.log.scrollHeight;
  }

  get busy() {
    return this.running !== null;
  }

  stop() {
    this.running?.stop();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren();
    this.on.used(0);
    this.on.trouble("");
  }

  /** Ask, and show the answer as it comes. */
  async send(words) {
    const { system, ...controls } = this.settings();
    const request = {
      ...controls,
      seed: controls.seed ?? drawnSeed(),
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...this.turns.map(({ role, content }) => ({ role, content })),
        { role: "user", content: words },
      ],
    };
    const asked = made("article", "turn user", words);
    asked.setAttribute("aria-label", "You");
    const answer = made("article", "turn model");
    answer.setAttribute("aria-label", "Model");
    const text = made("div", "text waiting");
    const meta = made("div", "meta quiet");
    answer.append(text, meta);
    this.log.append(asked, answer);
    this.follows = true;
    this.follow();
    const turns = this.turns;
    const completion = new Completion(request);
    const error = await this.run(completion, answer, (piece) => {
      text.classList.remove("waiting");
      text.append(piece);
      meta.textContent = this.figures(completion);
    });
    text.classList.remove("waiting");
    if (turns !== this.turns) return; // a new chat was begun meanwhile
    if ((error || completion.stopped) && !completion.text) {
      asked.remove();
      answer.remove();
      this.on.refused(words);
      return;
    }
    this.turns.push(
      { role: "user", content: words },
      { role: "assistant", content: completion.text },
    );
    if (!completion.text) text.append(made("i", "quiet", "nothing"));
    this.finish(completion, answer, meta);
  }

  /** Run a completion; what it could not do is shown in one line and given back. */
  async run(completion, article, grew) {
    this.running = completion;
    this.on.busy(true);
    this.on.trouble("");
    article.setAttribute("aria-busy", "true");
    try {
      await completion.run((piece) => {
        grew(piece);
        this.follow();
      });
      return null;
    } catch (error) {
      if (error.name === "AbortError") return null;
      if (!(error instanceof Refusal)) console.error(error);
      this.on.trouble(error.message, error.code === "context_length_exceeded");
      return error;
    } finally {
      article.removeAttribute("aria-busy");
      if (this.running === completion) {
        this.running = null;
        this.on.busy(false);
      }
    }
  }

  figures(completion) {
    const { tokens, rate, firstMs } = completion;
    const parts = [`${shown(tokens)} token${tokens === 1 ? "" : "s"}`];
    if (rate !== null) parts.push(`${shown(rate, 1)} tokens/s`);
    if (firstMs !== null) parts.push(`first after ${inTime(firstMs)}`);
    return parts.join(" · ");
  }

  /** What stands under an answer that has ended. */
  finish(completion, article, meta) {
    const { usage, request, receipt } = completion;
    meta.replaceChildren(this.figures(completion));
    const seed = button(`seed ${request.seed}`, "Use this seed from now on", () =>
      this.on.seed(request.seed),
    );
    const again = button("Repeat", "Ask again with the same seed, and compare every bit", () =>
      this.repeat(completion, article, again),
    );
    const tools = made("span", "actions");
    tools.append(seed, again);
    if (navigator.clipboard) {
      const copy = button("Copy", "Copy the answer", async () => {
        await navigator.clipboard.writeText(completion.text);
        this.on.said("Copied");
      });
      tools.append(copy);
    }
    if (receipt) {
      const words = "What repeats this answer anywhere: lpu replay receipt.json";
      tools.append(button("Receipt", words, () => save("receipt.json", receipt)));
    }
    meta.append(tools);
    let ended = "";
    if (completion.stopped) ended = "Stopped.";
    else if (completion.finish === null) ended = "Broken off.";
    else if (completion.finish === "length") ended = "Cut: the most tokens are reached.";
    if (usage) {
      const full = this.on.used(usage.total_tokens);
      const cut = completion.finish === "length";
      if (cut && full) ended = "Cut: the context is full. Start a new chat.";
      const cached = usage.prompt_tokens_details.cached_tokens;
      meta.title = `${shown(usage.prompt_tokens)} prompt tokens, ${shown(cached)} of them cached`;
    }
    if (ended) article.insertBefore(made("p", "ended", ended), meta);
    this.on.said(`Answer of ${shown(completion.tokens)} tokens. ${ended}`);
    this.follow();
  }

  /** The same request once more: does it come out the same? */
  async repeat(first, article, pressed) {
    if (this.busy) return;
    article.querySelector(".verdict")?.remove();
    article.querySelector(".other")?.remove();
    const verdict = made("p", "verdict", "Repeating");
    article.append(verdict);
    pressed.disabled = true;
    const again = new Completion(first.request);
    const error = await this.run(again, article, () => {
      const same = first.text.startsWith(again.text);
      verdict.textContent = `Repeating: ${shown(again.tokens)} tokens, ${same ? "the same" : "others"}`;
    });
    pressed.disabled = false;
    if (error || (again.stopped && !again.text)) {
      verdict.remove();
      return;
    }
    const [same, words] = compared(first, again);
    verdict.classList.add(same ? "same" : "other");
    verdict.textContent = words;
    if (!same) article.append(made("div", "text other", again.text));
    verdict.scrollIntoView({ block: "nearest" });
    this.on.said(words);
  }
}

function button(text, title, pressed) {
  const node = made("button", "small", text);
  node.type = "button";
  node.title = title;
  node.addEventListener("click", pressed);
  return node;
}

function save(name, text) {
  const link = made("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
