// The time axis: spectrogram, lanes of bars, playhead. A click plays from there.

import { Spectrogram } from "./sound.js";

const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 600]; // seconds between marks of the axis
const MARK = 58; // the least CSS pixels between marks
const READABLE = 60; // CSS pixels for a second, so that most words can be read
const LARGEST = 800; // CSS pixels for a second
const LAP = 0.08; // bars in one row may overlap by this many seconds, as a model's words often do
const ROWS = 8; // the most rows of a lane; further bars overlap in the last one
const ROW = 22; // CSS pixels

export class View {
  /** `player`: the <audio>; `find`: gives the page's element of an id. */
  constructor(player, find) {
    Object.assign(this, { player, length: 0, zoom: 1, spectrogram: null, lanes: {}, drawing: 0 });
    for (const name of ["view", "time", "picture", "axis", "lanes", "head"]) {
      this[`${name}Box`] = find(name);
    }
    for (const box of [this.pictureBox, this.axisBox]) {
      box.addEventListener("click", (event) => this.play(this.timeAt(event.clientX)));
    }
    this.pictureBox.addEventListener("keydown", (event) => this.key(event));
    this.viewBox.addEventListener("scroll", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(this.viewBox);
    find("in").addEventListener("click", () => this.setZoom(this.zoom * 2));
    find("out").addEventListener("click", () => this.setZoom(this.zoom / 2));
    player.addEventListener("play", () => this.follow());
    for (const event of ["seeked", "timeupdate", "pause"]) {
      player.addEventListener(event, () => this.move());
    }
    player.addEventListener("durationchange", () => {
      // What the browser plays, but cannot decode here, still has an axis.
      if (!this.spectrogram && Number.isFinite(player.duration)) this.show(null, player.duration);
    });
  }

  /** Shows a sound: its samples, or null if they are not known, and its length in seconds. */
  show(samples, length) {
    this.viewBox.hidden = false;
    this.spectrogram = samples && new Spectrogram(samples);
    this.length = length;
    this.pictureBox.hidden = !samples;
    this.pictureBox.setAttribute("aria-valuemax", length.toFixed(1));
    this.setZoom((length * READABLE) / (this.viewBox.clientWidth || 1));
    this.viewBox.scrollLeft = 0;
    this.move();
  }

  clear() {
    Object.assign(this, { length: 0, spectrogram: null, lanes: {} });
    this.lanesBox.replaceChildren();
    this.viewBox.hidden = true;
  }

  play(time) {
    this.player.currentTime = Math.min(Math.max(time, 0), this.length);
    // A page without sound has nothing to play; the browser tells that by itself.
    this.player.play().catch(() => {});
  }

  timeAt(x) {
    const box = this.timeBox.getBoundingClientRect();
    return (this.length * (x - box.left)) / box.width;
  }

  key(event) {
    const now = this.player.currentTime;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1 };
    Object.assign(to, { PageUp: now + 10, PageDown: now - 10, Home: 0, End: this.length });
    if (event.key in to) {
      this.player.currentTime = Math.min(Math.max(to[event.key], 0), this.length);
    } else if (event.key === " " || event.key === "Enter") {
      if (this.player.paused) this.play(now);
      else this.player.pause();
    } else return;
    event.preventDefault();
  }

  setZoom(zoom) {
    const wide = this.viewBox.clientWidth || 1;
    const middle = (this.viewBox.scrollLeft + wide / 2) / (wide * this.zoom);
    this.zoom = Math.max(1, Math.min(zoom, (this.length * LARGEST) / wide));
    this.timeBox.style.width = `${100 * this.zoom}%`;
    this.viewBox.scrollLeft = middle * wide * this.zoom - wide / 2;
    this.redraw();
  }

  // --- drawing -----------------------------------------------------------------------------------

  redraw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = requestAnimationFrame(() => this.draw());
  }

  draw() {
    const wide = this.viewBox.clientWidth;
    if (!wide || !this.length) return;
    const whole = this.timeBox.clientWidth;
    const from = (this.length * this.viewBox.scrollLeft) / whole;
    const to = from + (this.length * wide) / whole;
    this.pictureBox.style.width = `${wide}px`;
    this.spectrogram?.draw(this.pictureBox, from, to);
    const step = STEPS.find((step) => (step * whole) / this.length >= MARK) ?? 3600;
    const marks = [];
    for (let i = Math.floor(from / step); i * step <= Math.min(to, this.length); i++) {
      const mark = document.createElement("span");
      mark.textContent = written(i * step, step);
      mark.style.left = `${(100 * i * step) / this.length}%`;
      marks.push(mark);
    }
    this.axisBox.replaceChildren(...marks);
  }

  follow() {
    this.move();
    if (!this.player.paused) requestAnimationFrame(() => this.follow());
  }

  /** Puts the playhead where the player is. */
  move() {
    if (!this.length) return;
    const now = this.player.currentTime;
    const part = Math.min(now / this.length, 1);
    this.headBox.style.left = `${100 * part}%`;
    this.pictureBox.setAttribute("aria-valuenow", now.toFixed(1));
    const told = `${now.toFixed(1)} of ${this.length.toFixed(1)} seconds`;
    this.pictureBox.setAttribute("aria-valuetext", told);
    for (const { bars } of Object.values(this.lanes)) {
      for (const bar of bars) {
        const on = !this.player.paused && bar.start <= now && now < bar.end;
        if (on !== bar.on) bar.button.classList.toggle("now", (bar.on = on));
      }
    }
    const x = part * this.timeBox.clientWidth - this.viewBox.scrollLeft;
    if (!this.player.paused && (x < 0 || x > this.viewBox.clientWidth)) {
      this.viewBox.scrollLeft += x - 0.1 * this.viewBox.clientWidth;
    }
  }

  // --- lanes -------------------------------------------------------------------------------------

  /** Shows segments as bars in a lane, in place of what it had. */
  setLane(kind, name, segments) {
    this.lanes[kind]?.box.remove();
    delete this.lanes[kind];
    if (!segments.length) return;
    const box = document.createElement("div");
    box.className = `lane ${kind}`;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${name} on the time axis`);
    const label = document.createElement("span");
    label.className = "name";
    label.textContent = name;
    const holder = document.createElement("div");
    holder.className = "bars";
    const sorted = [...segments].sort((a, b) => a.start - b.start);
    const rows = rowsOf(sorted);
    holder.style.height = `${ROW * (Math.max(...rows) + 1)}px`;
    const bars = sorted.map((segment, i) => {
      return { ...segment, button: this.bar(segment, rows[i], i) };
    });
    holder.append(...bars.map((bar) => bar.button));
    holder.addEventListener("keydown", (event) => step(event, holder));
    box.append(label, holder);
    this.lanes[kind] = { box, bars, name, segments };
    const kinds = ["segments", "words", "events"].filter((kind) => kind in this.lanes);
    this.lanesBox.replaceChildren(...kinds.map((kind) => this.lanes[kind].box));
  }

  bar({ start, end, text }, row, number) {
    const button = document.createElement("button");
    const [left, right] = [start, end].map((time) => Math.min(time / this.length, 1));
    button.type = "button";
    button.textContent = text;
    button.title = `${start.toFixed(2)} - ${end.toFixed(2)}: ${text}`;
    button.setAttribute("aria-label", `${text}, ${start.toFixed(2)} to ${end.toFixed(2)} seconds`);
    button.style.left = `${100 * Math.min(left, 0.999)}%`;
    button.style.width = `${100 * Math.max(right - left, 0.001)}%`;
    button.style.top = `${ROW * row + 1}px`;
    button.tabIndex = number ? -1 : 0; // one stop of the Tab key for a lane; arrows go on
    button.addEventListener("click", () => this.play(start));
    return button;
  }
}

/** The row of each bar, which are sorted: the first whose last bar has ended, up to LAP. */
function rowsOf(bars) {
  const ends = [];
  return bars.map(({ start, end }) => {
    let row = ends.findIndex((last) => last <= start + LAP);
    if (row < 0) row = Math.min(ends.length, ROWS - 1);
    ends[row] = Math.max(ends[row] ?? 0, end);
    return row;
  });
}

/** Moves the focus along a lane. */
function step(event, holder) {
  const bars = [...holder.children];
  const now = bars.indexOf(document.activeElement);
  const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: bars.length - 1 }[event.key];
  if (to === undefined || !bars[to]) return;
  event.preventDefault();
  bars[now].tabIndex = -1;
  bars[to].tabIndex = 0;
  bars[to].focus();
}

function written(time, step) {
  if (step < 1) return `${time.toFixed(1)} s`;
  if (time < 60) return `${Math.round(time)} s`;
  return `${Math.floor(time / 60)}:${String(Math.round(time) % 60).padStart(2, "0")}`;
}
