// In: requests of the page. Out: the service's answers; refusals as errors of one line.

const KEY = "lpu-key";

export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Who is told when the service wants a key. */
export const wanting = new EventTarget();

/** The key lives as long as the tab: nothing is written to disk. */
export function useKey(secret) {
  if (secret) sessionStorage.setItem(KEY, secret);
  else sessionStorage.removeItem(KEY);
}

export async function ask(path, { body, headers, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers: {
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...(key ? { authorization: `Bearer ${key}` } : {}),
        ...headers,
      },
      cache: "no-store",
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the service cannot be reached");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401) wanting.dispatchEvent(new Event("key"));
  throw refusal(told.error, answer.status);
}

function refusal(error, status) {
  const message = typeof error?.message === "string" ? error.message : `status ${status}`;
  return new Refusal(status, message.replace(/\s+/g, " "), error?.code ?? null);
}

/** The data of server-sent events, as they come, each as text. Ends at [DONE]; an event that tells
 * of an error is thrown, and so is an end without [DONE]: half an answer must not look whole. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const text = part.slice(6);
        if (text === "[DONE]") return;
        if (text.startsWith('{"error"')) throw refusal(JSON.parse(text).error, 200);
        yield text;
      }
    }
  } catch (error) {
    if (error instanceof Refusal || error.name === "AbortError") throw error;
    throw new Refusal(0, "the connection broke off");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Refusal(0, "the answer broke off");
}
