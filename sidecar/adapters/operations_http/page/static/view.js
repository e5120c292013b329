// Draws what is known. Each part is drawn from the last documents of the API; nothing here asks the sidecar anything.

import { byId, h, renew, setText, shape } from "./dom.js";
import { awayText, durationText, momentText, numberText, percentText, plain } from "./words.js";

const CALM_TRIGGERS = 20;
const SYMBOLS = { lt: "<", le: "≤", gt: ">", ge: "≥", eq: "=", ne: "≠" };

/** The banner, the title and the icon of the tab. */
export function drawVerdict(verdict, because, model, now) {
  document.body.dataset.verdict = verdict.kind;
  const word = byId("word");
  setText(word, verdict.word);
  word.style.setProperty("--letters", String(Math.max(8, verdict.word.length)));
  setText(byId("line"), verdict.line);
  renew(byId("since"), verdict.since ? moment(verdict.since, now, "since ") : null);
  renew(byId("because"), because);
  byId("shape").setAttribute("href", `#shape-${verdict.kind}`);
  const name = model.status?.switch;
  if (name) setText(byId("switch"), name);
  const title = `${verdict.word} · ${name ?? location.host} · killswitch`;
  if (document.title !== title) document.title = title;
  drawIcon(verdict.kind);
}

let drawnIcon = "";

function drawIcon(kind) {
  if (drawnIcon === kind) return;
  drawnIcon = kind;
  const body = getComputedStyle(document.body);
  const symbol = byId(`shape-${kind}`).cloneNode(true);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-4 -4 72 72");
  // As on the banner: the shape on its ground, for a tab's bar may be light or dark.
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [attribute, value] of Object.entries({ x: -4, y: -4, width: 72, height: 72, rx: 12 })) {
    ground.setAttribute(attribute, value);
  }
  ground.setAttribute("fill", body.getPropertyValue("--ground").trim());
  svg.append(ground, ...symbol.childNodes);
  const ink = body.getPropertyValue("--ink").trim();
  const text = new XMLSerializer()
    .serializeToString(svg)
    .replaceAll("currentColor", ink)
    .replaceAll("var(--hole, #fff)", body.getPropertyValue("--ground").trim());
  byId("favicon").setAttribute("href", `data:image/svg+xml,${encodeURIComponent(text)}`);
}

/** Why it is so and who can change it, for a status that is fresh. */
export function becauseOf(status, now) {
  const reason = status.gate?.reason ?? {};
  const causes = (status.causes ?? []).map((cause) => causeLine(cause, now));
  const demands = (status.demands ?? []).filter((demand) => restricts(demand, status)).map((demand) => demandLine(demand, now));
  const lines = [];
  if (status.ready !== true && status.not_ready_reason) lines.push([status.not_ready_reason]);
  lines.push(...causes, ...demands);
  if (!lines.length && reason.code && reason.code !== "active") lines.push([reason.message]);
  if (!lines.length && reason.message && status.position_limit_factor < 1) lines.push([reason.message.replace(/^trading at [0-9.e-]+ of the position limits: /, "")]);
  const why = lines.length ? [h("dt", {}, "Why"), h("dd", {}, h("ul", { class: "why" }, lines.map((line) => h("li", {}, line))))] : [];
  const release = reason.release ? [h("dt", {}, "Released by"), h("dd", {}, releaseText(reason.release))] : [];
  const durable =
    status.durable === false
      ? [h("dt", {}, "Not durable"), h("dd", {}, "In force, but not on disk: a restart of the sidecar could forget it.")]
      : [];
  const next = nextText(status);
  const rows = [...why, ...release, ...(next ? [h("dt", {}, "Next"), h("dd", {}, next)] : []), ...durable];
  return rows.length ? h("dl", {}, rows) : null;
}

/** What the recovery does next by itself; empty where it waits for people. */
function nextText(status) {
  const recovery = status.recovery ?? {};
  const [first] = recovery.steps ?? [];
  if (recovery.stage === "COOLDOWN" && first) {
    const left = recovery.cooldown_remaining_seconds;
    return `${percentText(first.factor)} of the position limits ${left > 0 ? `in ${durationText(left)}` : "as soon as nothing is in the way"}`;
  }
  const next = recovery.next_step;
  if (!next) return "";
  const when = next.in_seconds > 0 ? `in ${durationText(next.in_seconds)}` : "now due";
  return `${percentText(next.factor)} of the position limits ${when}${next.waits_for ? `; waits for ${next.waits_for}` : ""}`;
}

/** Whether a demand says something that the causes do not say already. */
function restricts(demand, status) {
  const said = (status.causes ?? []).some((cause) => cause.trigger === demand.trigger);
  return demand.action !== "warn" && !(said && status.state !== "ACTIVE");
}

function releaseText(text) {
  const [before, command] = text.split(": killswitch ");
  return command ? [`${before}: `, h("code", {}, `killswitch ${command}`)] : text;
}

function causeLine(cause, now) {
  const proof = h("span", { class: "tag" }, cause.by_verified ? "verified" : "claimed");
  const who = cause.trigger
    ? ["rule ", h("b", {}, cause.trigger)]
    : cause.by
      ? ["by ", h("b", {}, cause.by), " ", proof]
      : [];
  const often = cause.count > 1 ? ` (${cause.count} times)` : "";
  return [
    h("span", { class: "said" }, `${cause.reason}${often}`),
    h("span", { class: "detail" }, h("span", { class: "tag" }, cause.code), " ", who, who.length ? ", " : "", moment(cause.time, now)),
  ];
}

function demandLine(demand, now) {
  const what = demand.action === "throttle" ? `throttle to ${percentText(demand.factor)}` : plain(demand.action);
  return [
    h("span", { class: "said" }, demand.message),
    h("span", { class: "detail" }, h("span", { class: "tag" }, demand.code), " rule ", h("b", {}, demand.trigger), ` asks to ${what}, `, moment(demand.since, now)),
  ];
}

function moment(text, now, before = "") {
  return h("span", { class: "moment" }, before, h("time", { datetime: text }, momentText(text)), ` (${awayText(text, now)})`);
}

/** Restriction, factor, stage, the ladder, waivers. */
export function drawLimits(model, now, obstacles) {
  const { status } = model;
  const recovery = status.recovery ?? {};
  const facts = [
    ["State", status.mode === "active" ? status.state : `${status.state} (${status.mode} mode)`],
    ["Restriction", plain(status.restriction)],
    ["Position limits", `${percentText(status.position_limit_factor)} (factor\u00a0${numberText(status.position_limit_factor)})`],
    ["Recovery", plain(recovery.stage ?? status.stage)],
  ];
  if (recovery.by) facts.push(["Asked for by", `${recovery.by}: ${recovery.reason ?? ""}`]);
  renew(byId("facts"), facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  renew(byId("ladder"), ladder(status, recovery, obstacles));
  const asked = ["PENDING", "VALIDATING"].includes(recovery.stage) ? recovery.waivers ?? [] : [];
  renew(byId("waivers"), [waivers("Waived rules", status.waivers ?? [], now), waivers("Rules that this recovery would waive", asked, now)]);
}

const ORDER = ["NONE", "PENDING", "VALIDATING", "COOLDOWN", "GRADUAL_RESTART", "COMPLETE"];

function ladder(status, recovery, obstacles) {
  const stage = recovery.stage ?? "NONE";
  const at = ORDER.indexOf(stage);
  const reached = status.state === "ACTIVE" ? status.position_limit_factor : 0;
  const quiet = stage === "NONE";
  const rungs = [];
  const granted = recovery.approvals ?? [];
  const needed = recovery.approvals_needed ?? 0;
  const names = granted.map((one) => `${one.by} (${one.by_verified ? "verified" : "claimed"})`).join(", ");
  rungs.push(rung(quiet ? "todo" : at > 2 ? "done" : "now", `${needed === 1 ? "1 approval" : `${needed} approvals`}`, approvalText(stage, granted.length, needed, names, recovery)));
  rungs.push(rung(at > 3 ? "done" : at === 3 ? "now" : "todo", "Cooldown", cooldownText(stage, recovery, obstacles)));
  const next = recovery.next_step;
  for (const step of recovery.steps ?? []) {
    const taken = at > 3 && reached >= step.factor;
    const present = at === 4 && reached === step.factor;
    const due = at === 4 && next && next.factor === step.factor;
    rungs.push(rung(present ? "now" : taken ? "done" : due ? "next" : "todo", `${percentText(step.factor)} of limits`, stepText(step, present, taken, due ? next : null)));
  }
  return rungs;
}

const MARKS = { done: "✓", now: "", next: "", todo: "" };
const SAID = { done: "done", now: "now", next: "next", todo: "to come" };

function rung(kind, title, text) {
  return h(
    "li",
    { class: `rung ${kind}`, "aria-current": kind === "now" ? "step" : null },
    h("span", { class: "mark", "aria-hidden": "true" }, MARKS[kind]),
    h("span", { class: "rung-title" }, title, h("span", { class: "hidden" }, ` (${SAID[kind]})`)),
    h("span", { class: "rung-text" }, text),
  );
}

function approvalText(stage, given, needed, names, recovery) {
  if (stage === "NONE") return needed ? "after a kill, with a code" : "none is asked for";
  if (stage === "VALIDATING") return `${names}. Rules and health are being looked at.`;
  if (stage !== "PENDING") return names;
  const lapse = recovery.approvals_lapse_in_seconds;
  const left = lapse === null || lapse === undefined ? "" : ` Lapses in ${durationText(lapse)}.`;
  return `${given} of ${needed}${names ? `: ${names}` : ""}. Waits for ${needed - given} more, by ${given ? "another person" : "an approver"}.${left}`;
}

function cooldownText(stage, recovery, obstacles) {
  if (stage !== "COOLDOWN") return durationText(recovery.cooldown_seconds);
  const left = recovery.cooldown_remaining_seconds;
  if (left > 0) return `${durationText(left)} left of ${durationText(recovery.cooldown_seconds)}`;
  const waits = recovery.waits_for ?? obstacles.join("; ");
  return waits ? `over; waits for ${waits}` : "over; looks at rules and health";
}

function stepText(step, present, taken, next) {
  if (present) return "now";
  if (taken) return "";
  const gates = (step.gates ?? []).map((gate) => `${gate.query} ${SYMBOLS[gate.operator] ?? gate.operator} ${numberText(gate.threshold)}`);
  const condition = gates.length ? `, if ${gates.join(" and ")}` : "";
  if (next) {
    const time = next.in_seconds > 0 ? `in ${durationText(next.in_seconds)}` : "due";
    return next.waits_for ? `${time}; waits for ${next.waits_for}` : `${time}${condition}`;
  }
  return `${step.after_seconds ? `${durationText(step.after_seconds)} after trading reopens` : "when trading reopens"}${condition}`;
}

function waivers(title, list, now) {
  if (!list.length) return null;
  const lines = list.map((one) => {
    const limit = one.threshold === null ? "without effect" : `holds at ${numberText(one.threshold)}`;
    return h("li", {}, h("b", {}, one.trigger), `: ${limit} until `, moment(one.until, now), `, by ${one.by}`);
  });
  return [h("h3", {}, title), h("ul", { class: "waivers" }, lines)];
}

/** The health checks, and the sources that rules ask. */
export function drawHealth(model, now) {
  const { health, status } = model;
  const sources = (status.sources ?? []).filter((one) => one.up !== null).map((one) => ({ name: `source ${one.name}`, ok: one.up, seen: one.up ? "up" : one.error ?? "down" }));
  const checks = [...(health?.checks ?? []), ...sources];
  const bad = checks.filter((one) => !one.ok).length;
  const when = model.healthAt ? `, checked ${awayText(new Date(model.healthAt).toISOString(), now)}` : "";
  setText(byId("health-summary"), health ? `${bad ? `${bad} of ${checks.length} not well` : "All well"}${when}` : model.healthError || "not checked yet");
  renew(
    byId("checks"),
    checks.map((one) =>
      h(
        "li",
        { class: one.ok ? "ok" : "bad" },
        h("span", { class: "mark" }, one.ok ? "✓" : "✕", h("span", { class: "hidden" }, one.ok ? "well: " : "not well: ")),
        h("span", { class: "check-name" }, plainName(one.name)),
        h("span", { class: "check-seen" }, one.seen === one.wanted || !one.wanted || one.ok ? String(one.seen) : `${one.seen}; wanted: ${one.wanted}`),
      ),
    ),
  );
}

function plainName(name) {
  return String(name).replaceAll("_", " ");
}

/** The table of triggers; `all` shows also the calm ones beyond the first few. */
export function drawTriggers(triggers, all) {
  const sorted = [...triggers].sort((one, other) => urgency(one) - urgency(other));
  const calm = sorted.filter((one) => urgency(one) >= 3).length;
  const shown = all ? sorted : sorted.slice(0, sorted.length - calm + CALM_TRIGGERS);
  renew(byId("triggers"), shown.map(triggerRow));
  setText(byId("triggers-summary"), triggersText(triggers));
  const button = byId("all-triggers");
  button.hidden = shown.length === sorted.length && !(all && calm > CALM_TRIGGERS);
  setText(button, all ? "Show fewer" : `Show all ${sorted.length} rules`);
}

function urgency(one) {
  if (!one.enabled) return 5;
  if (one.status === "firing") return one.enforcing ? 0 : 1;
  if (one.step) return 1;
  if (one.status === "pending" || !one.armed || one.health !== "ok") return 2;
  return one.shadow ? 4 : 3;
}

function triggersText(triggers) {
  if (!triggers.length) return "No rules are loaded.";
  const count = (holds) => triggers.filter(holds).length;
  const parts = [
    [count((one) => one.status === "firing"), "firing"],
    [count((one) => one.status !== "firing" && one.step), "at a step"],
    [count((one) => one.status === "pending"), "pending"],
    [count((one) => one.enabled && !one.armed), "not armed"],
  ].filter(([number]) => number);
  const rules = triggers.length === 1 ? "1 rule" : `${triggers.length} rules`;
  return parts.length ? `${rules}: ${parts.map(([number, word]) => `${number} ${word}`).join(", ")}` : `${rules}, none firing, all armed`;
}

function triggerRow(one) {
  const marks = [
    one.shadow && "shadow",
    !one.enabled && "disabled",
    one.waived && "waived",
  ].filter(Boolean);
  const summary = one.message && (one.status !== "inactive" || one.health !== "ok") ? one.message : "";
  const firing = one.status === "firing";
  const status = firing ? `firing: ${plain(one.action)}` : one.step ? `step: ${plain(one.step)}` : one.status;
  const health = !one.enabled ? "–" : one.health === "ok" && one.armed ? "ok, armed" : `${plain(one.health)}, ${one.armed ? "armed" : "not armed"}`;
  const threshold = one.threshold === null ? "–" : `${SYMBOLS[one.operator] ?? ""} ${numberText(one.threshold)}`.trim();
  const sick = one.enabled && (!one.armed || one.health !== "ok");
  return h(
    "tr",
    { role: "row", class: [firing ? "firing" : one.step ? "pending" : one.status, one.enabled ? "" : "off", sick ? "sick" : ""].filter(Boolean).join(" "), "data-trigger": one.trigger },
    h("th", { role: "rowheader", scope: "row" }, h("span", { class: "rule" }, one.trigger), marks.map((mark) => [" ", h("span", { class: "tag" }, mark)]), summary ? h("span", { class: "summary-line" }, summary) : null),
    cell("Status", [h("span", { class: "mark", "aria-hidden": "true" }, firing ? "▲" : one.step || one.status === "pending" ? "△" : "·"), " ", status], "status"),
    cell("Health", [sick ? h("span", { class: "mark", "aria-hidden": "true" }, "✕ ") : null, health], "health"),
    cell("Value", numberText(one.value, 4), "number"),
    cell("Limit", threshold, "number"),
    cell("Used", used(one.limit_used_ratio), "used"),
    cell("Age", one.sample_age_seconds === null ? "–" : ageText(one.sample_age_seconds), "number"),
    cell("Action", plain(one.action), "action"),
  );
}

function cell(label, content, className) {
  return h("td", { role: "cell", class: className, "data-label": label }, h("span", { class: "content" }, content));
}

function ageText(seconds) {
  return seconds < 10 ? `${Math.max(0, seconds).toFixed(1)}\u00a0s` : durationText(seconds);
}

function used(ratio) {
  if (typeof ratio !== "number" || !Number.isFinite(ratio)) return "–";
  const share = Math.round(Math.min(1, Math.max(0, ratio)) * 20);
  return [
    h("span", { class: "bar", "aria-hidden": "true" }, h("span", { class: `fill of-${share}${ratio >= 1 ? " full" : ratio >= 0.75 ? " near" : ""}` })),
    h("span", { class: "bar-text" }, percentText(ratio)),
  ];
}

/** The newest audit events, newest first. */
export function drawAudit(model, now) {
  const events = [...(model.audit ?? [])].reverse();
  setText(byId("audit-summary"), model.auditError || (events.length ? `The newest ${events.length}, newest first` : "No events yet."));
  renew(byId("audit"), events.map((event) => auditLine(event, now)));
}

function auditLine(event, now) {
  const moved = event.from && event.to && event.from !== event.to ? `${event.from} → ${event.to}` : "";
  return h(
    "li",
    {},
    h("span", { class: "when" }, h("time", { datetime: event.time }, momentText(event.time)), h("span", { class: "ago" }, awayText(event.time, now))),
    h("span", { class: "what" }, h("b", {}, event.type), moved ? h("span", { class: "moved" }, moved) : null),
    h("span", { class: "how" }, event.reason ? h("span", { class: "said" }, event.reason) : null, event.by ? h("span", { class: "by" }, `by ${event.by}`) : null),
  );
}

/** Which sidecar this is. */
export function drawFoot(status) {
  const parts = [`killswitch-sidecar ${status.version}`, `${status.mode} mode`, `epoch ${status.epoch}`, `started ${momentText(status.started)}`];
  setText(byId("foot"), parts.join(" · "));
}

/** What the sidecar itself calls a problem. */
export function drawProblems(status) {
  const problems = status?.problems ?? [];
  byId("problems").hidden = !problems.length;
  renew(byId("problems-list"), problems.map((problem) => h("li", {}, problem)));
}
