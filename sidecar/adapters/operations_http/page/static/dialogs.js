// Stop, recover, approve, cancel: each asks once more, names the switch, and shows a refusal word for word.
//
// A code is taken out of its field before the request is sent and is kept nowhere.

import { byId, h, renew, setText } from "./dom.js";
import { accepted, Refusal } from "./feed.js";
import { momentText, numberText } from "./words.js";

const PATIENCE_MS = 15000;

/**
 * Wire the four dialogs.
 *
 * `model()` is what is known, `headers()` what is sent along, `obstacles()` the rules in the way of a recovery, and
 * `done(words, status)` is told what the sidecar answered.
 */
export function wireDialogs({ model, headers, obstacles, done }) {
  const ask = async (method, path, body) => {
    const response = await fetch(path, {
      method,
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    return (await accepted(response)).json();
  };
  const wire = (name, opened, send) => new Form(name, { model, opened, send: (fields, form) => send(fields, form, ask), done });

  wire(
    "stop",
    (form) => {
      const policy = model().status?.killed_policy;
      setText(byId("stop-policy"), policy ? ` (${policy})` : "");
      form.field("reason").value = "Emergency stop";
      form.field("reason").select();
    },
    ({ reason, by, restriction }, _form, post) =>
      post("POST", "api/v1/trigger", { reason, ...(by && { by }), ...(restriction && { restriction }) }),
  );
  wire(
    "recover",
    (form) => {
      form.field("reason").value = "";
      form.field("by").value = "";
      drawWaivers(obstacles());
    },
    ({ reason, by, code }, _form, post) => {
      const waive = chosenWaivers();
      return post("POST", "api/v1/recovery", { reason, by, code, ...(waive.length && { waive }) });
    },
  );
  wire(
    "approve",
    (form) => {
      const recovery = model().status?.recovery ?? {};
      setText(byId("approve-what"), recovery.by ? `Asked for by ${recovery.by}: ${recovery.reason}${waivedText(recovery.waivers ?? [])}` : "");
      form.field("by").value = "";
    },
    ({ by, code }, _form, post) => post("POST", "api/v1/recovery/approvals", { by, code }),
  );
  wire(
    "cancel",
    (form) => {
      form.field("reason").value = "";
    },
    ({ reason, by }, _form, post) => post("DELETE", "api/v1/recovery", { reason, ...(by && { by }) }),
  );
}

class Form {
  constructor(name, { model, opened, send, done }) {
    this.name = name;
    this.dialog = byId(`${name}-dialog`);
    this.form = this.dialog.querySelector("form");
    this.refusal = this.dialog.querySelector(".refusal");
    this.submit = this.dialog.querySelector("button[type=submit]");
    Object.assign(this, { model, opened, send, done });
    byId(name).addEventListener("click", () => this.open());
    this.dialog.querySelector("[data-close]").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.closed());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.act();
    });
  }

  field(name) {
    return this.form.elements.namedItem(name);
  }

  open() {
    const { status, access, live } = this.model();
    for (const place of this.dialog.querySelectorAll("[data-switch]")) setText(place, status?.switch ?? "this pod");
    for (const place of this.dialog.querySelectorAll("[data-unnamed]")) place.hidden = Boolean(access?.name);
    for (const place of this.dialog.querySelectorAll("[data-when-down]")) place.hidden = live;
    renew(this.refusal);
    this.dialog.showModal();
    this.opened(this);
    this.form.querySelector("input").focus();
    if (this.name === "stop") this.field("reason").select();
  }

  closed() {
    this.form.reset();
    // The button that opened it may be gone with what it did.
    if (!byId(this.name).checkVisibility?.()) byId("verdict").focus({ preventScroll: true });
  }

  async act() {
    if (this.submit.disabled) return;
    const fields = Object.fromEntries(new FormData(this.form));
    if (this.field("code")) this.field("code").value = "";
    this.submit.disabled = true;
    renew(this.refusal, h("p", { class: "asking" }, "Asking the sidecar…"));
    try {
      const status = await this.send(fields, this);
      this.dialog.close();
      this.done(this.name, status);
    } catch (error) {
      renew(this.refusal, this.refused(error));
      this.field("code")?.focus();
    } finally {
      this.submit.disabled = false;
    }
  }

  refused(error) {
    if (!(error instanceof Refusal)) {
      const stop = this.name === "stop";
      return [
        h("p", { class: "refusal-title" }, stop ? "It is NOT KNOWN whether trading is stopped" : "No answer"),
        h("p", {}, `The sidecar did not answer: ${error.message}`),
        h("p", {}, stop ? "Try again, and if there is no answer, stop the trading container." : "Look at the status before you try again."),
      ];
    }
    const { problem } = error;
    const inForce = problem.durable === false && problem.state === "KILLED";
    return [
      h("p", { class: "refusal-title" }, inForce ? "Stopped, NOT durable" : `Refused (${error.status}): ${error.title}`),
      h("p", { class: "refusal-detail" }, error.detail),
      error.retryAfter ? h("p", {}, `Try again in ${error.retryAfter} s.`) : null,
      error.blockers.length > 1 ? h("ul", {}, error.blockers.map((one) => h("li", {}, one))) : null,
    ];
  }
}

function waivedText(waivers) {
  const rules = waivers.map((one) => `${one.trigger}${one.threshold === null ? "" : ` at ${numberText(one.threshold)}`} until ${momentText(one.until)}`);
  return rules.length ? `. It would waive ${rules.join(", ")}.` : "";
}

function drawWaivers(rules) {
  byId("waive").hidden = !rules.length;
  renew(
    byId("waive-rules"),
    rules.map((rule, index) =>
      h(
        "div",
        { class: "waiver", "data-waive": rule.trigger },
        h("label", { class: "choice" }, h("input", { type: "checkbox", "data-part": "chosen" }), h("span", {}, "Waive ", h("b", {}, rule.trigger), `: ${rule.why}`)),
        h(
          "div",
          { class: "pair" },
          h("div", { class: "field" }, h("label", { for: `waive-threshold-${index}` }, "New threshold ", h("span", { class: "optional" }, rule.threshold === null ? "(none for this rule)" : `(now ${numberText(rule.threshold)}; empty: no effect at all)`)), h("input", { id: `waive-threshold-${index}`, "data-part": "threshold", inputmode: "text", autocomplete: "off", pattern: "[+\\-]?[0-9]*\\.?[0-9]+([eE][+\\-]?[0-9]+)?", disabled: rule.threshold === null })),
          h("div", { class: "field" }, h("label", { for: `waive-until-${index}` }, "For or until ", h("span", { class: "optional" }, "(24h, or a time)")), h("input", { id: `waive-until-${index}`, "data-part": "until", value: "24h", autocomplete: "off" })),
        ),
      ),
    ),
  );
}

function chosenWaivers() {
  const part = (place, name) => place.querySelector(`[data-part=${name}]`);
  return [...document.querySelectorAll("[data-waive]")]
    .filter((place) => part(place, "chosen").checked)
    .map((place) => {
      const threshold = part(place, "threshold").value.trim();
      return {
        trigger: place.dataset.waive,
        until: part(place, "until").value.trim(),
        ...(threshold && { threshold: Number(threshold) }),
      };
    });
}
