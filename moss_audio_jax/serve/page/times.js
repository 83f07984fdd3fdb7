// Times in answers, and segments {start, end, text} as files. What Python's text/timestamps.py and
// text/textgrid.py do for the usual forms, so that a saved file is the same from either.

const CLOCK = String.raw`\d{1,3}:\d{2}(?::\d{2})?(?:\.\d+)?`;
const DECIMAL = String.raw`\d{1,9}\.\d+`;
const TIME = String.raw`(?:${CLOCK}|\d{1,9}(?:\.\d+)?)`;
const UNIT = String.raw`(?:\s*(?:s|secs?|seconds?)\b|\s*秒)`;
const TO = String.raw`\s*(?:-+>?|[‐-―~→]|to\b)\s*`;
const STAMP = new RegExp(String.raw`[\[［【]\s*(${TIME})${UNIT}?\s*[\]］】]`, "g");
const EVENT = new RegExp(
  String.raw`^\s*(?:[-*•]\s+)?[\[(]?(${TIME})${UNIT}?[\])]?${TO}[\[(]?(${TIME})${UNIT}?[\])]?` +
    String.raw`\s*([:：,]?)\s*(\S.*)$`,
);
// "[1.20]", "00:03", "3.2 s", and both ends of "0.45 - 1.83".
const LINK = new RegExp(
  String.raw`[\[［【]\s*(?:${TIME})${UNIT}?\s*[\]］】]|(?<![\d:.])${CLOCK}(?![\d:])` +
    String.raw`|(?<![\d.])\d{1,9}(?:\.\d+)?${UNIT}` +
    String.raw`|(?<![\d.])${DECIMAL}(?=${TO}${DECIMAL})|(?<=${DECIMAL}${TO})${DECIMAL}`,
  "g",
);

/** Seconds of a clock or a number, with or without brackets and a unit. */
export function seconds(time) {
  return (time.match(/[\d.]+/g) ?? []).reduce((sum, part) => sum * 60 + Number(part), 0);
}

/** A text in pieces: {text}, and {text, time} for each time that lies in the sound. */
export function pieces(text, length) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(LINK)) {
    const time = seconds(match[0]);
    if (time > length) continue;
    if (match.index > at) found.push({ text: text.slice(at, match.index) });
    found.push({ text: match[0], time });
    at = match.index + match[0].length;
  }
  if (at < text.length) found.push({ text: text.slice(at) });
  return found;
}

/** The segments of an answer: "[0.0]text[1.0]", or "0.00 - 1.00: text" in lines. */
export function segments(text) {
  const stamps = [...text.matchAll(STAMP)];
  const stamped = [];
  for (let i = 0; i + 1 < stamps.length; i++) {
    const said = text.slice(stamps[i].index + stamps[i][0].length, stamps[i + 1].index).trim();
    if (said) stamped.push(segment(stamps[i][1], stamps[i + 1][1], said));
  }
  const events = [];
  for (const line of text.split("\n")) {
    const match = EVENT.exec(line);
    // "1 - 2 people talk" is not an event: whole numbers need a colon.
    if (match && (match[3] || /[.:]/.test(match[1]))) {
      events.push(segment(match[1], match[2], match[4].trim()));
    }
  }
  return events.length > stamped.length ? events : stamped;
}

function segment(start, end, text) {
  start = seconds(start);
  return { start, end: Math.max(start, seconds(end)), text };
}

// --- files ---------------------------------------------------------------------------------------

const CUE = 500; // milliseconds: how long a subtitle without a length is shown

/** (start, end, text) in milliseconds, by start; every cue ends later than it starts. */
function cues(segments) {
  const rows = segments
    .map((s) => [Math.round(s.start * 1000), Math.round(s.end * 1000), lines(s.text)])
    .sort((a, b) => a[0] - b[0]);
  const made = [];
  let waiting = []; // texts without a length that start with the next cue
  rows.forEach(([start, end, text], i) => {
    const next = rows[i + 1]?.[0];
    if (start === end && start === next) {
      waiting.push(text);
      return;
    }
    if (start === end) end = Math.min(start + CUE, next ?? Infinity);
    made.push([start, end, [...waiting, text].filter(Boolean).join("\n")]);
    waiting = [];
  });
  return made;
}

/** The text without blank lines: one would end the cue. */
function lines(text) {
  return text.split(/\r?\n/).filter((line) => line.trim()).join("\n");
}

function clock(time, point) {
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const whole = `${two(time / 3600000)}:${two((time / 60000) % 60)}:${two((time / 1000) % 60)}`;
  return whole + point + String(time % 1000).padStart(3, "0");
}

function srt(segments) {
  const cue = ([start, end, text], i) =>
    `${i + 1}\n${clock(start, ",")} --> ${clock(end, ",")}\n${text.replaceAll("-->", "->")}\n`;
  return cues(segments).map(cue).join("\n");
}

function vtt(segments) {
  const marks = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
  const cue = ([start, end, text]) =>
    `${clock(start, ".")} --> ${clock(end, ".")}\n${text.replace(/[&<>]/g, (c) => marks[c])}\n`;
  return ["WEBVTT\n", ...cues(segments).map(cue)].join("\n");
}

function json(segments) {
  return `${JSON.stringify(segments, null, 2)}\n`;
}

/** Praat's long text form. What overlaps goes to another tier; what has no length is a point. */
function textGrid(segments, length) {
  const rows = [...segments].sort((a, b) => a.start - b.start || a.end - b.end);
  const end = Math.max(length, ...rows.map((row) => row.end)) || 1;
  const tiers = [[]];
  for (const row of rows.filter((row) => row.end > row.start)) {
    let tier = tiers.find((tier) => !tier.length || tier.at(-1).end <= row.start);
    if (!tier) tiers.push((tier = []));
    tier.push(row);
  }
  const points = new Map(); // Praat allows one point at a time
  for (const { start, text } of rows.filter((row) => row.end === row.start)) {
    points.set(start, points.has(start) ? `${points.get(start)} ${text}` : text);
  }
  const count = tiers.length + (points.size ? 1 : 0);
  const out = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0"];
  out.push(`xmax = ${decimal(end)}`, "tiers? <exists>", `size = ${count}`, "item []:");
  const head = (number, kind, name) => {
    out.push(`    item [${number}]:`, `        class = "${kind}"`, `        name = "${name}"`);
    out.push("        xmin = 0", `        xmax = ${decimal(end)}`);
  };
  tiers.forEach((tier, i) => {
    const intervals = [];
    let reached = 0;
    for (const row of [...tier, { start: end, end, text: "" }]) {
      if (row.start > reached) intervals.push({ start: reached, end: row.start, text: "" });
      if (row.end > row.start) intervals.push(row);
      reached = row.end;
    }
    head(i + 1, "IntervalTier", i ? `segments ${i + 1}` : "segments");
    out.push(`        intervals: size = ${intervals.length}`);
    intervals.forEach((row, j) => {
      out.push(`        intervals [${j + 1}]:`, `            xmin = ${decimal(row.start)}`);
      out.push(`            xmax = ${decimal(row.end)}`, `            text = ${quoted(row.text)}`);
    });
  });
  if (points.size) {
    head(count, "TextTier", "points");
    out.push(`        points: size = ${points.size}`);
    [...points].forEach(([time, text], j) => {
      out.push(`        points [${j + 1}]:`, `            number = ${decimal(time)}`);
      out.push(`            mark = ${quoted(text)}`);
    });
  }
  return `${out.join("\n")}\n`;
}

function decimal(value) {
  return value.toFixed(6).replace(/\.?0+$/, "");
}

function quoted(text) {
  return `"${text.replaceAll('"', '""')}"`;
}

/** Writers of (segments, length of the sound), by the ending of the file's name. */
export const WRITERS = { srt, vtt, TextGrid: textGrid, json };
