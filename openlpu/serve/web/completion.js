// In: one request for an answer. Out: the answer as it grows, with its times, tokens and receipt.

import { ask, events } from "/web/service.js";

const RECEIPT = '"lpu_receipt": ';

export function drawnSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** One answer. `run` calls `grew(text)` with each new piece of text. */
export class Completion {
  constructor(request) {
    this.request = request;
    this.text = "";
    this.tokens = 0;
    this.finish = null; // the service's reason; null while it runs, or if it never came to an end
    this.usage = null;
    this.receipt = null; // the service's own words: numbers that are read may be written otherwise
    this.firstMs = null;
    this.lastMs = null;
    this.controller = new AbortController();
  }

  async run(grew) {
    const body = {
      ...this.request,
      stream: true,
      stream_options: { include_usage: true },
      logprobs: true, // so that the receipt holds their bits
    };
    const began = performance.now();
    const signal = this.controller.signal;
    const answer = await ask("/v1/chat/completions", {
      body,
      signal,
      headers: { "x-lpu-receipt": "true" },
    });
    for await (const text of events(answer)) {
      const chunk = JSON.parse(text);
      const choice = chunk.choices[0];
      if (choice === undefined) {
        this.usage = chunk.usage;
        const at = text.indexOf(RECEIPT);
        if (at >= 0) this.receipt = text.slice(at + RECEIPT.length, -1);
        continue;
      }
      this.tokens += choice.logprobs?.content?.length ?? 0;
      this.finish = choice.finish_reason ?? this.finish;
      const piece = choice.delta.content;
      if (!piece) continue;
      this.lastMs = performance.now() - began;
      this.firstMs ??= this.lastMs;
      this.firstTokens ??= this.tokens;
      this.text += piece;
      grew(piece);
    }
    if (this.usage) this.tokens = this.usage.completion_tokens;
  }

  stop() {
    this.controller.abort();
  }

  get stopped() {
    return this.controller.signal.aborted;
  }

  /** Tokens per second after the first ones. */
  get rate() {
    const more = this.tokens - this.firstTokens;
    return more > 0 && this.lastMs > this.firstMs ? (1000 * more) / (this.lastMs - this.firstMs) : null;
  }

  get digest() {
    return this.receipt && JSON.parse(this.receipt).sha256;
  }
}

/** Whether a second answer to the same request is the first one again: [same, in words]. */
export function compared(first, again) {
  const tokens = `${again.tokens.toLocaleString("en")} token${again.tokens === 1 ? "" : "s"}`;
  if (first.digest && again.digest) {
    if (first.digest === again.digest) {
      return [true, `Identical: ${tokens} and their log probabilities, bit for bit`];
    }
    return [false, first.text === again.text ? "Same text, other bits" : differs(first, again)];
  }
  // One of them was stopped: as far as both go.
  const common = Math.min(first.text.length, again.text.length);
  if (first.text.slice(0, common) === again.text.slice(0, common)) {
    return [true, `Identical as far as both go: ${common.toLocaleString("en")} characters`];
  }
  return [false, differs(first, again)];
}

function differs(first, again) {
  let at = 0;
  while (first.text[at] === again.text[at]) at += 1;
  return `Different from character ${(at + 1).toLocaleString("en")} on`;
}
