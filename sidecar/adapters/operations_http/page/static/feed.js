// The sidecar's event stream, read by fetch (an EventSource could not send a token), begun again whenever it breaks.
//
// What it hands on is fresh or it is not handed on: a stream that falls silent, falls behind, or was held back while
// the tab slept is dropped, and what comes next is a status made after the new request.

/** The sidecar sends a status at least this often (docs/API.md, Events). */
export const STREAM_PERIOD_MS = 1000;
export const SILENCE_MS = 2.5 * STREAM_PERIOD_MS;
const FIRST_ANSWER_MS = 5000;
const BACKOFF_MS = [250, 500, 1000, 2000, 4000];
const WATCH_MS = 250;

/** An answer that is a problem document. */
export class Refusal extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || `HTTP ${status}`);
    this.status = status;
    this.title = problem.title || `HTTP ${status}`;
    this.detail = problem.detail || "";
    this.blockers = Array.isArray(problem.blockers) ? problem.blockers : [];
    this.retryAfter = retryAfter;
    this.problem = problem;
  }
}

/** Return an answer that is good; throw a Refusal for any other. */
export async function accepted(response) {
  if (response.ok) return response;
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    problem = { title: `HTTP ${response.status}`, detail: "The answer is no problem document: is this the sidecar?" };
  }
  throw new Refusal(response.status, problem, response.headers.get("Retry-After"));
}

/** Time that has passed by either clock: one stands still while the machine sleeps, the other may be set. */
class Stopwatch {
  constructor() {
    this.start();
  }

  start() {
    this.steady = performance.now();
    this.wall = Date.now();
  }

  get elapsed() {
    return Math.max(performance.now() - this.steady, Date.now() - this.wall);
  }
}

/**
 * One stream after another.
 *
 * `before()` is awaited before each and may throw; `headers()` are sent with it; `onEvent(name, content)` gets what is
 * fresh; `onDown(error)` is called once whenever that ends, and while it cannot be had.
 */
export class Feed {
  constructor({ before, headers, onEvent, onDown }) {
    this.before = before;
    this.headers = headers;
    this.onEvent = onEvent;
    this.onDown = onDown;
    /** Milliseconds to add to this machine's clock to get the sidecar's. */
    this.skew = 0;
    this.live = false;
    this.failures = 0;
    this.news = new Stopwatch();
    this.attempt = null;
    this.wake = null;
    this.run = 0;
    setInterval(() => this.look(), WATCH_MS);
  }

  /** Begin anew, at once. */
  start() {
    this.run += 1;
    this.failures = 0;
    this.attempt?.abort(new Error("begun anew"));
    this.wake?.();
    this.loop(this.run);
  }

  /** End until the next `start`. */
  stop() {
    this.run += 1;
    this.live = false;
    this.attempt?.abort(new Error("ended"));
    this.wake?.();
  }

  /** Drop a stream that has been silent for too long; called often, and at once when the tab comes back. */
  look() {
    if (this.live && this.news.elapsed > SILENCE_MS) this.attempt?.abort(new Error("the sidecar has fallen silent"));
  }

  /** Try again now and not after the pause. */
  hurry() {
    this.look();
    this.wake?.();
  }

  async loop(run) {
    while (run === this.run) {
      let failure = null;
      try {
        await this.read(run);
        failure = new Error("the sidecar has ended the stream");
      } catch (error) {
        failure = this.attempt?.signal.aborted ? this.attempt.signal.reason : error;
      }
      if (run !== this.run) return;
      this.attempt?.abort(failure);
      this.live = false;
      this.onDown(failure);
      if (run !== this.run) return;
      await this.pause();
    }
  }

  async pause() {
    const longest = BACKOFF_MS[Math.min(this.failures, BACKOFF_MS.length - 1)];
    this.failures += 1;
    // Not all pages at the same moment: a sidecar that has just started has other things to do.
    const wait = longest * (0.75 + 0.5 * Math.random());
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, wait);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.wake = null;
  }

  async read(run) {
    const attempt = new AbortController();
    this.attempt = attempt;
    const asked = new Stopwatch();
    const tooLate = setTimeout(() => attempt.abort(new Error("the sidecar does not answer")), FIRST_ANSWER_MS);
    try {
      await this.before(attempt.signal);
      asked.start();
      const response = await accepted(
        await fetch("api/v1/events", { headers: this.headers(), cache: "no-store", signal: attempt.signal }),
      );
      for await (const [name, text] of events(response.body)) {
        if (run !== this.run || attempt.signal.aborted) return;
        this.take(name, JSON.parse(text), asked);
        clearTimeout(tooLate);
      }
    } finally {
      clearTimeout(tooLate);
    }
  }

  take(name, content, asked) {
    if (name === "status") {
      const made = new Date(content.time).getTime();
      if (this.live) {
        if (this.news.elapsed > SILENCE_MS) throw new Error("the sidecar had fallen silent");
        if (Date.now() + this.skew - made > SILENCE_MS) throw new Error("what the sidecar says arrives too late");
      } else {
        if (asked.elapsed > FIRST_ANSWER_MS) throw new Error("the sidecar answers too slowly");
        this.skew = made - Date.now();
      }
      this.news.start();
      this.live = true;
      this.failures = 0;
    }
    if (this.live) this.onEvent(name, content);
  }
}

/** Name and data of every event of a body of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let name = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      if (data.length) yield [name, data.join("\n")];
    }
  }
}
