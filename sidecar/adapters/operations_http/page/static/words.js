// Times, durations and numbers as this page writes them; the same words as those of the command line.

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** Seconds with the two largest units that matter: "2 h 5 min", "45 s". */
export function durationText(seconds) {
  if (!Number.isFinite(seconds)) return "an unknown time";
  let left = Math.max(0, Math.ceil(seconds));
  const parts = [];
  for (const [size, unit] of UNITS) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count) parts.push(`${count}\u00a0${unit}`);
    if (parts.length === 2 || (parts.length && !count)) break;
  }
  return parts.join(" ") || "0\u00a0s";
}

/** A moment in UTC to the second; text that is no moment is returned as it is. */
export function momentText(text) {
  const moment = new Date(text);
  if (Number.isNaN(moment.getTime())) return String(text ?? "");
  return `${moment.toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

/** The time of day of a moment, in UTC. */
export function clockText(text) {
  return momentText(text).slice(11);
}

/** How long ago, or how far ahead, a moment is; `now` in milliseconds. */
export function awayText(text, now) {
  const away = (now - new Date(text).getTime()) / 1000;
  if (!Number.isFinite(away)) return "";
  return away < 0 ? `in ${durationText(-away)}` : `${durationText(Math.floor(away))} ago`;
}

/** A number with so many digits that count; "–" for none. */
export function numberText(value, digits = 6) {
  return typeof value === "number" && Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : "–";
}

/** A ratio as percent. A limit that is not reached is never rounded up to 100 %. */
export function percentText(ratio) {
  if (typeof ratio !== "number" || !Number.isFinite(ratio)) return "–";
  const shown = Math.round(ratio * 100);
  return `${shown === 100 && ratio < 1 ? 99 : shown}\u00a0%`;
}

/** A code of the API as words: "reduce_only" is "reduce only". */
export function plain(code) {
  return String(code ?? "").replaceAll("_", " ").toLowerCase();
}
