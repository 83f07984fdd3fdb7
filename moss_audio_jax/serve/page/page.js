// A sound, a conversation about it, and its transcript, through the server's own API.

import { RATE, decode, record } from "./sound.js";
import { WRITERS, pieces, segments } from "./times.js";
import { View } from "./view.js";

const find = (id) => document.getElementById(id);
const player = find("player");
const view = new View(player, find);

let model = null; // the name by which the server is asked
let sound = null; // {file, data: a promise of base64}
let turns = []; // {role, content} of what was answered
let asking = null; // AbortController of the answer that is written
let transcribing = null;
let recording = null;

// --- the server ----------------------------------------------------------------------------------

/** A reply of the API. Throws an Error with one line for the reader. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    find("key-form").hidden = false;
    find("key").focus();
    throw new Error(`The server ${key ? "does not know this" : "needs an"} API key.`);
  }
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
}

/** The events of a streamed reply, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function learnModel() {
  const { data } = await (await call("v1/models")).json();
  model = data[0].id;
  find("model").textContent = model;
}

function fail(error) {
  find("error").textContent = error.message;
  find("error").hidden = false;
}

function say(text) {
  find("status").textContent = text;
}

find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", find("key").value);
  find("key").value = "";
  find("error").hidden = true;
  try {
    await learnModel();
    find("key-form").hidden = true;
    find("question").focus();
  } catch (error) {
    fail(error);
  }
});

// --- a sound -------------------------------------------------------------------------------------

async function load(file) {
  asking?.abort();
  transcribing?.abort();
  find("error").hidden = true;
  const mine = { file, data: null };
  sound = mine;
  forget();
  view.clear();
  find("transcript").hidden = find("save").hidden = true;
  find("clip").hidden = false;
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  find("about").textContent = file.name;
  try {
    const samples = await decode(file);
    if (sound !== mine) return; // another one was chosen meanwhile
    const length = samples.length / RATE;
    view.show(samples, length);
    find("about").textContent = `${file.name}, ${length.toFixed(1)} s`;
    say(`Loaded: ${file.name}, ${length.toFixed(1)} seconds`);
  } catch {
    if (sound !== mine) return;
    find("about").textContent = `${file.name}: this browser cannot draw it; the server may read it`;
    say(find("about").textContent);
  }
}

/** The sound's bytes as the API takes them; encoded once. */
function encoded(of) {
  of.data ??= new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(of.file);
  });
  return of.data;
}

find("file").addEventListener("change", () => {
  const [file] = find("file").files;
  find("file").value = ""; // so that the same file can be chosen again
  if (file) load(file);
});

for (const [kind, over] of [
  ["dragover", true],
  ["dragleave", false],
  ["drop", false],
]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // a text for the question
    event.preventDefault(); // without it the browser would leave the page for the file
    document.body.classList.toggle("over", over);
    if (kind === "drop" && event.dataTransfer.files.length) load(event.dataTransfer.files[0]);
  });
}

find("record").addEventListener("click", async () => {
  const button = find("record");
  button.disabled = true;
  find("error").hidden = true;
  try {
    if (recording) {
      const { handle, timer } = recording;
      recording = null;
      clearInterval(timer);
      button.textContent = "Record";
      button.classList.remove("on");
      await load(await handle.stop());
    } else {
      const handle = await record();
      const begun = Date.now();
      const tell = () => {
        button.textContent = `Stop recording (${Math.round((Date.now() - begun) / 1000)} s)`;
      };
      recording = { handle, timer: setInterval(tell, 500) };
      button.classList.add("on");
      tell();
      say("Recording");
    }
  } catch (error) {
    const refused = error.name === "NotAllowedError" || error.name === "NotFoundError";
    fail(refused ? new Error(`No microphone: ${error.message}.`) : error);
  }
  button.disabled = false;
});

// --- the conversation ----------------------------------------------------------------------------

function forget() {
  turns = [];
  find("talk").replaceChildren();
  find("fresh").hidden = true;
  showSegments("events", "Answer", []);
}

/** An element with a class and a text. */
function made(tag, kind, text = "") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

/** A text whose times are links that play from there. */
function linked(text) {
  return pieces(text, view.length).map((piece) => {
    if (piece.time === undefined) return document.createTextNode(piece.text);
    const link = made("a", "time-link", piece.text);
    link.href = `#t=${piece.time}`;
    link.title = "Play from here";
    link.addEventListener("click", (event) => {
      event.preventDefault();
      view.play(piece.time);
    });
    return link;
  });
}

function showTurn(role, name, text) {
  const turn = made("article", `turn ${role}`);
  const said = made("div", "said", text);
  turn.append(made("h3", "", name), said);
  find("talk").append(turn);
  return { turn, said };
}

async function messages(question) {
  const format = /mp3$/i.test(sound.file.name) ? "mp3" : "wav"; // its contents decide
  const first = { type: "input_audio", input_audio: { data: await encoded(sound), format } };
  const all = [...turns, { role: "user", content: question }];
  // The sound stays with the first turn, so that the server knows the beginning again.
  all[0] = { role: "user", content: [first, { type: "text", text: all[0].content }] };
  return all;
}

async function ask(question) {
  find("error").hidden = true;
  if (!sound) {
    fail(new Error("Choose or record a sound first."));
    return;
  }
  const control = new AbortController();
  asking = control;
  find("ask").hidden = true;
  find("stop").hidden = false;
  find("fresh").hidden = false;
  const user = showTurn("user", "You", question);
  const { turn, said } = showTurn("model", "Model", "");
  turn.setAttribute("aria-busy", "true"); // a screen reader waits until all is said
  turn.scrollIntoView({ block: "nearest" });
  const thinking = made("details", "");
  const steps = made("div", "");
  thinking.append(made("summary", "", "Thinking"), steps);
  thinking.hidden = true;
  said.before(thinking);
  const notes = [];
  let text = "";
  let why = null;
  try {
    if (!model) await learnModel();
    const body = JSON.stringify({ model, messages: await messages(question), stream: true });
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body, signal: control.signal };
    for await (const event of events(await call("v1/chat/completions", options))) {
      const choice = event.choices[0];
      if (choice?.delta.reasoning_content) {
        thinking.hidden = false;
        steps.textContent += choice.delta.reasoning_content;
      }
      text += choice?.delta.content ?? "";
      said.textContent = text;
      why = choice?.finish_reason ?? why;
      notes.push(...(event.warnings ?? []));
    }
  } catch (error) {
    if (!turn.isConnected) return; // the conversation was ended
    if (error.name !== "AbortError") fail(error);
    why = error.name === "AbortError" ? "stopped" : "error";
  } finally {
    if (asking === control) {
      asking = null;
      find("ask").hidden = false;
      find("stop").hidden = true;
    }
  }
  if (!turn.isConnected) return;
  said.replaceChildren(...linked(text));
  turn.append(...notes.map((note) => made("p", "warning", note)));
  if (text && why !== "error") {
    turns.push({ role: "user", content: question }, { role: "assistant", content: text });
    const heard = segments(text);
    if (heard.length) showSegments("events", "Answer", heard);
  }
  if (why === "stopped") turn.append(made("small", "", "Stopped."));
  else if (why === "length" && !notes.length) {
    turn.append(made("small", "", "Cut short: too long."));
  } else if (why === "error") {
    turn.remove();
    user.turn.remove();
    find("question").value ||= question;
  } else if (!text) turn.append(made("small", "", "No answer came."));
  turn.removeAttribute("aria-busy");
}

function submit() {
  const question = find("question").value.trim();
  if (!question || asking) return;
  if (sound) find("question").value = "";
  ask(question);
}

find("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
find("stop").addEventListener("click", () => {
  asking?.abort();
  find("question").focus();
});
find("fresh").addEventListener("click", () => {
  asking?.abort();
  forget();
  find("question").focus();
});
find("ideas").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  find("question").value = event.target.textContent;
  submit();
});

// --- the transcript ------------------------------------------------------------------------------

find("transcribe").addEventListener("click", async () => {
  if (transcribing) {
    transcribing.abort();
    return;
  }
  const button = find("transcribe");
  const [control, mine] = [new AbortController(), sound];
  transcribing = control;
  find("error").hidden = true;
  button.textContent = "Stop transcribing";
  button.classList.add("on");
  say("Transcribing");
  try {
    if (!model) await learnModel();
    const form = new FormData();
    form.append("file", mine.file, mine.file.name);
    form.append("model", model);
    form.append("response_format", "verbose_json");
    form.append("timestamp_granularities[]", "word");
    form.append("timestamp_granularities[]", "segment");
    const options = { method: "POST", body: form, signal: control.signal };
    const reply = await (await call("v1/audio/transcriptions", options)).json();
    if (sound === mine) showTranscript(reply);
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
  transcribing = null;
  button.textContent = "Transcribe";
  button.classList.remove("on");
});

function showTranscript(reply) {
  if (!view.length) view.show(null, reply.duration);
  const box = find("transcript");
  const said = (reply.segments ?? []).map(({ start, end, text }) => ({ start, end, text }));
  const words = (reply.words ?? []).map(({ start, end, word }) => ({ start, end, text: word }));
  const rows = said.map(({ start, text }) => {
    const row = made("p", "");
    row.append(...linked(`[${start.toFixed(2)}]`), ` ${text}`);
    return row;
  });
  if (!rows.length) rows.push(made("p", "", reply.text || "No speech was heard."));
  const notes = (reply.warnings ?? []).map((note) => made("p", "warning", note));
  if (reply.stopped_at !== undefined) {
    const note = made("p", "warning", "Something may be missing from ");
    note.append(...linked(`${reply.stopped_at.toFixed(2)} s`), " on.");
    notes.unshift(note);
  }
  box.replaceChildren(...notes, ...rows);
  box.hidden = false;
  showSegments("segments", "Sentences", said);
  showSegments("words", "Words", words);
  say(`Transcript: ${words.length} words`);
}

// --- lanes and files -----------------------------------------------------------------------------

/** Shows segments on the time axis, and offers them as a file. */
function showSegments(kind, name, found) {
  view.setLane(kind, name, view.length ? found : []);
  const before = find("lane").value;
  const options = Object.entries(view.lanes).map(([kind, lane]) => new Option(lane.name, kind));
  find("lane").replaceChildren(...options);
  if (before in view.lanes) find("lane").value = before;
  find("save").hidden = !options.length;
}

find("save").addEventListener("click", (event) => {
  const form = event.target.dataset.form;
  if (!form) return;
  const lane = view.lanes[find("lane").value];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([WRITERS[form](lane.segments, view.length)]));
  link.download = `${sound.file.name.replace(/\.[^.]*$/, "")}.${form}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

learnModel().catch(fail);
