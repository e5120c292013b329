// What a status means for whoever looks: may this pod trade? Knows no page and no network.
//
// It says that orders pass only where the gate itself says so and nothing in the status contradicts it.

import { percentText, plain } from "./words.js";

const BLIND = new Set(["not_ready", "stale", "internal_error"]);
const EXITS = " Exits that shrink a position pass, cancels always.";
const CANCELS = " Only cancels pass.";

/**
 * The verdict on a status of the API.
 *
 * `kind` is one of allowed, reduced, blocked, notready, shadow, disabled, unknown; `word` the one to be read from
 * across the room; `line` one sentence; `since` the moment from which on it holds.
 */
export function verdictOf(status) {
  const gate = status.gate ?? {};
  const reason = gate.reason ?? {};
  const since = reason.since ?? status.since;
  const say = (kind, word, line, from = since) => ({ kind, word, line, since: from });
  if (status.state === "DISABLED") {
    return say("disabled", "DISABLED", "Every order passes: nothing is evaluated and nothing is blocked.");
  }
  if (gate.decision === "allow") return allowed(status, reason, say);
  if (gate.decision === "deny") return denied(status, reason, say);
  return say("unknown", "UNKNOWN", "The sidecar does not say what the gate answers. Take it for blocked.");
}

function allowed(status, reason, say) {
  if (status.mode === "shadow") {
    const would = wouldBlock(status, reason);
    return would
      ? say("shadow", "SHADOW", `Orders pass. It would block now: ${would}`)
      : say("shadow", "SHADOW", "Orders pass, and would pass with rules in force too. No rule blocks in shadow mode.");
  }
  const factor = status.position_limit_factor;
  const contradicts = status.state !== "ACTIVE" || status.restriction !== "none" || status.ready !== true || !(factor > 0);
  if (contradicts) return say("unknown", "UNKNOWN", "The sidecar's answer contradicts itself. Take it for blocked.");
  if (factor < 1) {
    return say("reduced", `REDUCED ${percentText(factor)}`, `Orders pass up to ${percentText(factor)} of the position limits.`);
  }
  return say("allowed", "ALLOWED", "Orders pass, up to the full position limits.", status.since);
}

function wouldBlock(status, reason) {
  if (reason.code === "shadow") return String(reason.message ?? "").replace(/^shadow mode: would be (denied as )?[a-z_]+: /, "");
  return status.state === "ACTIVE" && status.restriction === "none" ? "" : `the switch is ${status.state}.`;
}

function denied(status, reason, say) {
  const passes = status.restriction === "reduce_only" ? EXITS : CANCELS;
  if (status.state === "KILLED") return say("blocked", "BLOCKED", `Killed.${passes}`, status.since);
  if (status.state === "RECOVERING") {
    return say("blocked", "BLOCKED", `Recovering: still blocked until the cooldown is over.${passes}`, status.since);
  }
  if (reason.code === "not_ready") {
    return say("notready", "NOT READY", `Blocked until the sidecar knows enough to allow orders.${CANCELS}`, status.started);
  }
  if (BLIND.has(reason.code)) return say("blocked", "BLOCKED", `The sidecar cannot tell (${plain(reason.code)}).${CANCELS}`);
  if (status.restriction === "reduce_only") return say("reduced", "REDUCE ONLY", `New positions are blocked by a rule.${EXITS}`);
  if (status.restriction === "halt") return say("blocked", "BLOCKED", `Halted by a rule that lifts by itself.${CANCELS}`);
  if (reason.code === "blind_order") {
    const share = percentText(status.position_limit_factor);
    return say("reduced", `REDUCED ${share}`, `Orders that state their size pass up to ${share} of the position limits.`);
  }
  return say("blocked", "BLOCKED", `The gate denies new orders (${plain(reason.code) || "it does not say why"}).`);
}
