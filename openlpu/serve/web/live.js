// In: the service's counters, twice a second while somebody looks. Out: rates, charts, figures.

import { Chart } from "/web/chart.js";
import { made, shown } from "/web/chat.js";
import { ask } from "/web/service.js";

const PERIOD_MS = 500;
const PATIENCE_MS = 2500; // after a failure
const RATE_SAMPLES = 3; // a rate is over so many samples: steps do not keep step with us

const find = (selector) => document.querySelector(selector);
const perSecond = (number) => shown(number, number > 0 && number < 10 ? 1 : 0);
const inTime = (s) => (s < 1 ? `${shown(1000 * s, s < 0.01 ? 1 : 0)} ms` : `${shown(s, 1)} s`);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count > 0 ? Math.min(units.length - 1, Math.floor(Math.log2(count) / 10)) : 0;
  const number = count / 1024 ** power;
  return `${shown(number, number < 10 && power > 0 ? 1 : 0)} ${units[power]}`;
}

const CHARTS = {
  out: {
    title: "Tokens out",
    lines: [{ name: "a second", colour: "blue", area: true }],
    write: perSecond,
    least: 10,
  },
  in: {
    title: "Tokens in",
    lines: [{ name: "a second", colour: "teal", area: true }],
    write: perSecond,
    least: 10,
  },
  batch: {
    title: "Batch",
    lines: [
      { name: "sequences in a step", colour: "blue", area: true },
      { name: "requests waiting", colour: "amber", area: false },
    ],
    write: perSecond,
    least: 5,
  },
  first: {
    title: "First token",
    lines: [{ name: "median", colour: "violet", area: true }],
    write: inTime,
    least: 0.01,
  },
  between: {
    title: "Between tokens",
    lines: [{ name: "median", colour: "violet", area: true }],
    write: inTime,
    least: 0.01,
  },
  kv: {
    title: "K/V memory",
    lines: [
      { name: "pages held", colour: "blue", area: true },
      { name: "kept for equal beginnings", colour: "pale", area: false },
    ],
    write: shown,
    least: 10,
  },
};

export class Live {
  constructor() {
    this.charts = Object.fromEntries(
      Object.entries(CHARTS).map(([name, chart]) => {
        return [name, new Chart(find(`[data-chart="${name}"]`), chart)];
      }),
    );
    this.recent = [];
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.awake());
  }

  /** Whether anybody can see the charts. */
  get watched() {
    return !document.hidden && find("#live").offsetParent !== null;
  }

  /** Look if somebody watches; else stop looking. */
  awake() {
    if (!this.watched) {
      clearTimeout(this.timer);
      this.timer = null;
      this.pause();
    } else if (this.timer === null && !this.looking) {
      this.look();
    }
  }

  pause() {
    if (this.recent.length) this.push([null, null, [null, null], null, null, [null, null]]);
    this.recent = [];
  }

  async look() {
    this.looking = true;
    const began = performance.now();
    let next = PERIOD_MS;
    try {
      const answer = await ask("/stats");
      this.take(await answer.json());
      this.pulse("alive", "twice a second");
    } catch (error) {
      this.pause();
      this.pulse("away", error.status === 401 ? "wants a key" : error.message);
      next = PATIENCE_MS;
    }
    this.looking = false;
    if (!this.watched) {
      this.pause();
      return;
    }
    const rest = Math.max(50, next - (performance.now() - began));
    this.timer = setTimeout(() => {
      this.timer = null;
      this.awake();
    }, rest);
  }

  pulse(state, words) {
    const node = find("#pulse");
    if (node.dataset.state === state && node.textContent === words) return;
    node.dataset.state = state;
    node.textContent = words;
  }

  take(now) {
    const before = this.recent[0];
    this.recent.push(now);
    if (this.recent.length > RATE_SAMPLES) this.recent.shift();
    this.memory(now.kv);
    this.facts(now);
    if (before === undefined || now.time_s <= before.time_s) {
      if (before !== undefined) this.recent = [now]; // another process answers
      return;
    }
    const grown = (name) => Math.max(0, now[name] - before[name]);
    const rate = (name) => grown(name) / (now.time_s - before.time_s);
    const steps = grown("steps");
    // A step that takes longer than we waited is under way.
    const batch = steps > 0 ? grown("batch_sequences") / steps : now.running;
    this.push([
      rate("generated_tokens"),
      rate("read_tokens"),
      [batch, now.waiting],
      now.first_token_s,
      now.token_s,
      [now.kv.held, now.kv.kept],
    ]);
  }

  push(numbers) {
    Object.values(this.charts).forEach((chart, i) => chart.push([numbers[i]].flat()));
  }

  memory({ held, kept, limit, page_bytes: size, page_tokens: tokens }) {
    const all = limit ?? held + kept;
    const share = (pages) => `${all ? (100 * pages) / all : 0}%`;
    find("#kv .held").style.width = share(held);
    find("#kv .kept").style.width = share(kept);
    const told = size === null ? (pages) => `${shown(pages)} pages` : (pages) => bytes(pages * size);
    const free = limit === null ? "no limit" : `${shown(limit - held - kept)} pages free`;
    const used = limit === null ? told(all) : `${told(held + kept)} of ${told(all)}`;
    find("#kv-text").textContent = `${used} · ${free}, ${tokens} tokens each`;
    find("#kv").setAttribute("aria-label", `${shown(held)} held, ${shown(kept)} kept, ${free}`);
  }

  facts(now) {
    const part = (some, all, what) => {
      if (!all) return ["–"];
      return [`${shown((100 * some) / all)} %`, made("small", "", ` of ${shown(all)} ${what}`)];
    };
    const set = (name, ...parts) => find(`#f-${name}`).replaceChildren(...parts);
    set("cached", ...part(now.cached_tokens, now.prompt_tokens, "prompt tokens"));
    set("accepted", ...part(now.accepted_tokens, now.proposed_tokens, "proposed"));
    set("answers", shown(now.answers));
    set("steps", shown(now.steps));
    set("preemptions", shown(now.preemptions));
  }
}
