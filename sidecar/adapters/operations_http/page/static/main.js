// The page: what is known, from where, and when it has to be drawn anew.
//
// The one rule of it: a verdict is shown only while the stream is fresh. Whatever is older is drawn as the last thing
// seen, with its age, under a banner that says not to trust it.

import { byId, h, renew, setText } from "./dom.js";
import { wireDialogs } from "./dialogs.js";
import { accepted, Feed, Refusal } from "./feed.js";
import { verdictOf } from "./verdict.js";
import { becauseOf, drawAudit, drawHealth, drawFoot, drawLimits, drawProblems, drawTriggers, drawVerdict } from "./view.js";
import { clockText, durationText, numberText, plain } from "./words.js";

const AUDIT_EVENTS = 25;
const HEALTH_EVERY_MS = 15000;
const SHORT_MS = 10000;

const model = {
  access: null,
  status: null,
  triggers: [],
  audit: null,
  auditError: "",
  auditSequence: null,
  health: null,
  healthAt: 0,
  healthError: "",
  live: false,
  heard: 0,
  down: "",
  locked: "",
  allTriggers: false,
};

/** The token, in this variable and nowhere else. */
let token = "";

const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

const feed = new Feed({
  headers,
  before: async (signal) => {
    model.access = await read("api/v1/access", signal);
    if (!model.access.read.allowed) throw new Refusal(model.access.read.status, { detail: model.access.read.detail });
    model.locked = "";
  },
  onEvent: (name, content) => {
    if (name === "status") {
      const fresh = !model.live;
      const moved = fresh || model.status?.epoch !== content.epoch || model.status?.state !== content.state;
      Object.assign(model, { status: content, live: true, heard: Date.now(), down: "" });
      if (fresh || content.audit_head_sequence !== model.auditSequence) readAudit(content.audit_head_sequence);
      if (moved || Date.now() - model.healthAt > HEALTH_EVERY_MS) readHealth();
    }
    if (name === "triggers") model.triggers = content.triggers;
    draw();
  },
  onDown: (error) => {
    model.live = false;
    model.down = error instanceof Refusal ? error.detail || error.title : error.message;
    if (error instanceof Refusal && (error.status === 401 || error.status === 403)) {
      model.locked = token ? model.down : "This sidecar tells nothing without a token.";
      feed.stop();
    }
    draw();
  },
});

async function read(path, signal = AbortSignal.timeout(SHORT_MS)) {
  return (await accepted(await fetch(path, { headers: headers(), cache: "no-store", signal }))).json();
}

async function readAudit(sequence) {
  model.auditSequence = sequence;
  try {
    model.audit = (await read(`api/v1/audit?limit=${AUDIT_EVENTS}`)).events;
    model.auditError = "";
  } catch (error) {
    model.auditError = `The audit cannot be read: ${error.message}`;
    model.auditSequence = null;
  }
  draw();
}

let checking = false;

async function readHealth() {
  if (checking) return;
  checking = true;
  model.healthAt = Date.now();
  try {
    model.health = await read("api/v1/health");
    model.healthError = "";
  } catch (error) {
    model.health = null;
    model.healthError = `Health is not known: ${error.message}`;
  } finally {
    checking = false;
  }
  draw();
}

/** Rules that a recovery would be refused for, and why each. */
function obstacles() {
  const killers = new Set((model.status?.causes ?? []).map((one) => one.trigger));
  return model.triggers
    .filter((one) => !one.waived && (one.enforcing ? one.status !== "inactive" || one.health !== "ok" : killers.has(one.trigger)))
    .map((one) => ({
      trigger: one.trigger,
      threshold: one.threshold,
      why:
        !one.enforcing
          ? "killed, and is not enforced any more"
          : one.status === "inactive"
          ? `${plain(one.health)}, cannot see`
          : `${one.status}, ${numberText(one.value)} against ${numberText(one.threshold)}`,
    }));
}

// Drawing

let drawn = "";

function draw() {
  const now = Date.now() + feed.skew;
  const verdict = verdictNow();
  drawVerdict(verdict, becauseNow(now), model, now);
  drawLink();
  drawAccess();
  byId("known").classList.toggle("old", !model.live);
  byId("known").hidden = !model.status;
  if (model.status) {
    drawProblems(model.status);
    drawFoot(model.status);
    drawLimits(model, now, obstacles().map((one) => `rule ${one.trigger} (${one.why})`));
    drawHealth(model, now);
    drawTriggers(model.triggers, model.allTriggers);
    drawAudit(model, now);
  }
  announce(verdict);
}

function verdictNow() {
  if (model.live) return verdictOf(model.status);
  if (model.locked) return { kind: "unknown", word: "NOT SIGNED IN", line: "This page does not know whether this pod may trade." };
  if (!model.down && !model.status) return { kind: "unknown", word: "UNKNOWN", line: "Asking the sidecar…" };
  return { kind: "unknown", word: "DISCONNECTED", line: "Do not trust this page: it does not know whether this pod may trade." };
}

function becauseNow(now) {
  if (model.live) return becauseOf(model.status, now);
  if (model.locked) return null;
  if (!model.down && !model.status) return null;
  const rows = [h("dt", {}, "Why"), h("dd", {}, model.down)];
  if (model.status) {
    const last = verdictOf(model.status);
    const age = durationText(Math.floor((Date.now() - model.heard) / 1000));
    rows.push(h("dt", {}, "Last seen"), h("dd", { class: "last" }, h("s", {}, last.word), ` ${age} ago; it may be otherwise by now.`));
  }
  rows.push(
    h("dt", {}, "What to do"),
    h("dd", {}, "Ask the gate, as the bot does: ", h("code", {}, "killswitch check"), " in the sidecar's container. If that fails too, stop the trading container."),
  );
  return h("dl", {}, rows);
}

function drawLink() {
  const link = byId("link");
  link.dataset.live = String(model.live);
  const made = model.status?.time;
  const text = model.live ? `live, ${clockText(made)}` : model.locked ? "not signed in" : model.heard ? "disconnected, trying again" : "connecting";
  setText(byId("link-text"), text);
  const caller = byId("caller");
  const name = model.access?.name;
  caller.hidden = !name;
  if (name) setText(caller, `signed in as ${name}`);
}

function drawAccess() {
  const { access, status } = model;
  const may = (act) => access === null || access[act].allowed;
  // Where nothing is known, to stop is offered: it must not depend on what else works.
  const watching = access !== null && !access.stop.allowed && !access.tokens;
  byId("readonly").hidden = !watching;
  if (watching) drawReadOnly(access);
  byId("signin").hidden = !access?.tokens || (access.stop.allowed && access.recover.allowed);
  setText(byId("signin-why"), signInText(access));
  const killed = status?.state === "KILLED";
  const under = status?.state === "RECOVERING" || status?.stage === "PENDING" || status?.stage === "VALIDATING";
  byId("stop").hidden = !may("stop") || status?.state === "DISABLED";
  byId("recover").hidden = !access || !may("recover") || !killed || status.stage === "PENDING";
  byId("approve").hidden = !access || !may("recover") || status?.stage !== "PENDING";
  byId("cancel").hidden = !access || !may("stop") || !under;
  byId("actions").hidden = ["stop", "recover", "approve", "cancel"].every((id) => byId(id).hidden);
  const note = access?.stop.allowed && !access.recover.allowed && (killed || status?.stage === "PENDING") ? access.recover.detail : "";
  byId("action-notes").hidden = !note;
  setText(byId("action-notes"), note ? `To recover: ${note}.` : "");
}

function drawReadOnly(access) {
  renew(
    byId("readonly"),
    h("h2", {}, "This page can only watch"),
    h("p", {}, `The sidecar says: ${access.stop.detail}.`),
    h("p", {}, "To stop: ", h("code", {}, 'kubectl exec -it POD -c killswitch -- killswitch trigger --reason "TEXT" --by NAME')),
  );
}

function signInText(access) {
  if (!access) return "";
  if (model.locked) return model.locked;
  if (!access.name) return "Give a token to stop or to recover from here.";
  const lacking = [access.stop, access.recover].find((one) => !one.allowed);
  return lacking ? `${lacking.detail}. Another token may do more.` : "";
}

function announce(verdict) {
  if (verdict.word === drawn) return;
  const first = drawn === "";
  drawn = verdict.word;
  if (first && verdict.kind === "unknown") return;
  const words = `${verdict.word}. ${verdict.line}`;
  const urgent = verdict.kind === "blocked" || verdict.kind === "unknown" || verdict.kind === "notready";
  setText(byId("urgent"), urgent ? words : "");
  setText(byId("polite"), urgent ? "" : words);
}

const DONE = { stop: "Stopped", recover: "Recovery asked for", approve: "Approved", cancel: "Recovery cancelled" };

wireDialogs({
  model: () => model,
  headers,
  obstacles,
  done: (what, status) => {
    const { state, stage, durable } = status;
    const how = durable ? "on disk" : "NOT on disk";
    setText(byId("answer"), `${DONE[what]}. The sidecar says: ${state}${stage && stage !== "NONE" ? `, ${plain(stage)}` : ""}, ${how}.`);
    feed.hurry();
  },
});

byId("signin-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  byId("token").value = "";
  feed.start();
  byId("verdict").focus({ preventScroll: true });
});
byId("check").addEventListener("click", () => readHealth());
byId("all-triggers").addEventListener("click", () => {
  model.allTriggers = !model.allTriggers;
  draw();
});

// A tab that slept holds old news, and its timers slept too: look before anybody else does.
for (const event of ["visibilitychange", "resume"]) document.addEventListener(event, () => feed.hurry());
for (const event of ["pageshow", "online", "focus"]) addEventListener(event, () => feed.hurry());

setInterval(draw, 1000);
draw();
feed.start();
