// The browser of answers in the page of `evaluate report`: rows become elements when looked at.
'use strict';
(function () {
const D = JSON.parse(document.getElementById('rows').textContent), PAGE = 50;
const AXIS = 1000, ROW = 20, LAP = 0.08;
let shown = [], page = 0;
const answers = D.items.map(() => []);
D.rows.forEach(row => answers[row.i].push(row));

function make(tag, kind, ...inside) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...inside.filter(one => one !== null && one !== undefined));
  return element;
}
function esc(text) {
  return String(text).replace(/[&<>"']/g, c => '&#' + c.charCodeAt(0) + ';');
}

// --- filters ---
const controls = document.getElementById('controls'), selects = {};
function select(name, first, values) {
  const before = selects[name] ? selects[name].value : '';
  const box = selects[name] || make('select');
  box.replaceChildren(new Option(first, ''), ...values.map(v => new Option(v[1], v[0])));
  box.value = values.some(v => v[0] === before) ? before : '';
  if (!selects[name]) {
    box.addEventListener('change', () => { if (name === 'benchmark') groups(); update(); });
    box.setAttribute('aria-label', first);
    controls.append(box);
    selects[name] = box;
  }
}
function counted(of) {
  const count = new Map();
  D.rows.forEach(row => { const v = of(row); count.set(v, (count.get(v) || 0) + 1); });
  return [...count].map(([v, n]) => [v, v.replace(/_/g, ' ') + ' (' + n + ')']);
}
function groups() {
  const wanted = selects.benchmark.value, found = new Set();
  D.items.forEach((item, i) => {
    if (answers[i].length && (!wanted || D.files[answers[i][0].f][0] === wanted))
      pairs(item).forEach(pair => found.add(pair));
  });
  select('group', 'all groups', [...found].sort().map(pair => [pair, pair]));
}
function pairs(item) {
  return Object.entries(item.group).flatMap(([k, v]) => [].concat(v).map(one => k + ': ' + one));
}
select('benchmark', 'all benchmarks', counted(row => D.files[row.f][0]));
select('model', 'all models', counted(row => D.files[row.f][1]));
select('mark', 'all verdicts',
  [...counted(row => row.mark), ['differ', 'official and strict differ']]);
select('status', 'all statuses', counted(row => row.status));
groups();
select('order', 'as in the data', [['worst', 'worst first']]);
const search = make('input');
search.type = 'search';
search.placeholder = 'search in id, prompt, reference, answer';
let waiting;
search.addEventListener('input', () => {
  clearTimeout(waiting);
  waiting = setTimeout(update, 150);
});
controls.append(search);

function words(row) {
  if (row.words === undefined) {
    const item = D.items[row.i];
    row.words = [item.id, item.prompt, JSON.stringify(item.reference), row.answer, row.thinking,
      row.error].join('\n').toLowerCase();
  }
  return row.words;
}
function credit(row) { return row.credit === undefined ? 2 : row.credit; }
function update() {
  const v = name => selects[name].value, text = search.value.trim().toLowerCase();
  shown = D.rows.filter(row =>
    (!v('benchmark') || D.files[row.f][0] === v('benchmark')) &&
    (!v('model') || D.files[row.f][1] === v('model')) &&
    (!v('status') || row.status === v('status')) &&
    (!v('mark') || (v('mark') === 'differ'
      ? row.official !== undefined && row.official !== row.credit : row.mark === v('mark'))) &&
    (!v('group') || pairs(D.items[row.i]).includes(v('group'))) &&
    (!text || words(row).includes(text)));
  if (v('order') === 'worst') shown.sort((a, b) => credit(a) - credit(b));
  page = 0;
  list();
}
function list() {
  const part = shown.slice(page * PAGE, (page + 1) * PAGE);
  document.getElementById('list').replaceChildren(...part.map(line));
  const button = (text, to) => {
    const made = make('button', '', text);
    made.disabled = to < 0 || to * PAGE >= shown.length;
    made.addEventListener('click', () => { page = to; list(); });
    return made;
  };
  const first = page * PAGE + 1, last = page * PAGE + part.length;
  const count = shown.length ? first + '–' + last + ' of ' : '';
  document.getElementById('pager').replaceChildren(button('‹ back', page - 1),
    count + shown.length.toLocaleString('en') + ' row(s)', button('next ›', page + 1));
}

// --- one row ---
function line(row) {
  const item = D.items[row.i], box = make('details');
  box.append(make('summary', '',
    make('span', 'badge ' + row.mark, row.mark), make('span', 'faint', D.files[row.f][0]),
    make('span', '', D.files[row.f][1]), make('span', 'faint', item.id),
    make('span', '', row.status === 'ok' ? '' : '[' + row.status.replace(/_/g, ' ') + '] ',
      make('small', '', row.detail ? row.detail + '  ' : ''), (row.answer || '').slice(0, 200))));
  box.addEventListener('toggle', () => {
    if (box.open && box.children.length === 1) box.append(opened(row, item));
  });
  return box;
}
function opened(row, item) {
  const list = make('dl'), add = (name, ...inside) =>
    list.append(make('dt', '', name), make('dd', '', ...inside));
  add('', ...pairs(item).map(pair => make('span', 'tag', pair)));
  add('prompt', item.prompt || '(not in the score file)');
  add('reference', ...reference(item, row));
  const same = answers[row.i], first = [row, ...same.filter(other => other !== row)];
  first.forEach(other => {
    const said = [];
    if (other.thinking) said.push(make('div', 'think', other.thinking));
    if (other.error) said.push(make('mark', '', 'failed: ' + other.error));
    said.push(...answer(other, item));
    add(same.length > 1 ? D.files[other.f][1] : 'answer', ...said, '\n',
      make('span', 'badge ' + other.mark, ' ' + other.mark + ' '),
      make('small', '', [' strict', official(other, item),
        other.status === 'ok' ? '' : other.status.replace(/_/g, ' '), other.detail,
        other.parsed && item.kind === 'choice' ? 'read as: ' + other.parsed : '']
        .filter(one => one).join('; ')));
  });
  const heard = item.audio.map((path, n) => sound(path, n ? null : item, first));
  if (!heard.length && timed(item)) heard.push(sound(null, item, first));
  return make('div', timed(item) ? 'open timed' : 'open', ...heard, list);
}
function official(row, item) {
  if (row.official === undefined) return item.kind === 'choice' ? 'official rule: not counted' : '';
  return 'official rule: ' + (row.official === 1 ? 'right' : row.official || 'wrong');
}
function reference(item, row) {
  const ref = item.reference;
  if (item.kind === 'choice' && ref.choices.includes(ref.answer))
    return [String.fromCharCode(65 + ref.choices.indexOf(ref.answer)) + '. ' + ref.answer];
  if (timed(item)) return [spans(timed(item))];
  if (item.kind === 'asr') return differing(ref.text, row.answer || '');
  if (ref.sources) return [ref.sources.map(names => names.join(' or ')).join('\n')];
  if (item.kind === 'caption') return Object.entries(ref).map(([k, v]) => make('div', '',
    make('small', '', k + ' '), typeof v === 'string' ? v : JSON.stringify(v)));
  return [ref.answer === null ? '(not published)' : String(ref.answer ?? JSON.stringify(ref))];
}
function answer(row, item) {
  if (!row.answer) return ['(nothing)'];
  return item.kind === 'asr' ? differing(row.answer, item.reference.text) : [row.answer];
}
function timed(item) {
  return { timestamps: item.reference.slots, events: item.reference.events }[item.kind];
}
function spans(some) {
  const lines = some.map(s => s.start.toFixed(2) + ' – ' + s.end.toFixed(2) + '  ' + s.text);
  return lines.join('\n') || '(none)';
}
// A text whose words (characters of Chinese) that the other text lacks are marked.
function differing(text, other) {
  const unit = /[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+|\s+/g;
  const cut = t => t.match(unit) || [];
  const bare = t => t.toLowerCase().replace(/[^\p{L}\p{N}']/gu, '');
  const all = cut(text), a = all.map(bare), b = cut(other).map(bare).filter(t => t);
  const at = a.flatMap((t, i) => t ? [i] : []), n = at.length, m = b.length;
  if (n * m > 1e6) return [text];
  const most = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      most[i][j] = a[at[i]] === b[j]
        ? most[i + 1][j + 1] + 1 : Math.max(most[i + 1][j], most[i][j + 1]);
  const kept = new Set();
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[at[i]] === b[j]) { kept.add(at[i]); i++; j++; }
    else if (most[i + 1][j] >= most[i][j + 1]) i++;
    else j++;
  }
  return all.map((t, i) => a[i] && !kept.has(i) ? make('mark', '', t) : t);
}

// --- sound and time ---
function sound(path, item, rows) {
  const box = make('div');
  if (path !== null && D.clips[path]) {
    box.innerHTML = D.clips[path];
    box.querySelector('svg').remove();
  } else {
    const clip = make('div', 'clip');
    if (path !== null && D.audio[path]) {
      const player = make('audio');
      player.controls = true;
      player.preload = 'metadata';
      player.src = D.audio[path];
      clip.append(player);
    } else if (path !== null) clip.append(make('small', '', 'no audio: ' + path));
    clip.append(make('div', 'time', make('div', 'head')));
    box.append(clip);
  }
  const clip = box.querySelector('.clip'), time = box.querySelector('.time');
  const head = time.querySelector('.head'), player = box.querySelector('audio');
  const lanes = item && timed(item) ? [['truth', timed(item), []], ...rows.map(row =>
    [D.files[row.f][1], Array.isArray(row.parsed) ? row.parsed : [], row.off || []])] : [];
  let length = parseFloat(clip.dataset.seconds) ||
    1.02 * Math.max(1, ...lanes.flatMap(lane => lane[1].map(bar => bar.end)));
  const draw = () => {
    time.querySelectorAll('svg').forEach(old => old.remove());
    if (time.hidden = !lanes.length && !time.querySelector('img')) return;
    head.insertAdjacentHTML('beforebegin', drawn(lanes, length, D.colours[item && item.kind]));
  };
  draw();
  if (!player) { head.remove(); return box; }
  player.addEventListener('loadedmetadata', () => {
    if (isFinite(player.duration) && player.duration > 0 && !clip.dataset.seconds) {
      length = player.duration;
      draw();
    }
  });
  const move = () => {
    head.style.left = 100 * player.currentTime / length + '%';
    if (!player.paused) requestAnimationFrame(move);
  };
  player.addEventListener('play', move);
  player.addEventListener('seeked', move);
  time.addEventListener('click', event => {
    const area = time.getBoundingClientRect();
    player.currentTime = length * (event.clientX - area.left) / area.width;
    player.play();
  });
  return box;
}
function drawn(lanes, seconds, colour) {
  const scale = AXIS / seconds, parts = [];
  let top = 0;
  lanes.forEach(([name, bars, off]) => {
    const ends = [], order = bars.map((bar, i) => i).sort((i, j) => bars[i].start - bars[j].start);
    const short = name.length > 16 ? name.slice(0, 15) + '…' : name;
    parts.push(`<text class="name" x="-8" y="${top + 14}">${esc(short)}</text>`);
    order.forEach(i => {
      const bar = bars[i], paint = off.includes(i) ? D.colours.off : colour;
      let row = ends.findIndex(end => end <= bar.start + LAP);
      if (row < 0) row = Math.min(ends.length, 7);
      ends[row] = Math.max(ends[row] || 0, bar.end);
      const x = Math.min(bar.start * scale, AXIS - 1);
      const width = Math.max(Math.min(bar.end * scale, AXIS) - x, 1);
      parts.push(`<svg x="${x}" y="${top + row * ROW + 2}" width="${width}" height="16">` +
        `<title>${esc(spans([bar]))}</title><rect width="${width}" height="16" fill="${paint}" ` +
        `fill-opacity="0.22" stroke="${paint}"/><text x="2" y="12">${esc(bar.text)}</text></svg>`);
    });
    top += Math.max(ends.length, 1) * ROW + 5;
  });
  const step = [1, 2, 5, 10, 30, 60, 300].find(s => seconds / s <= 16) || 600;
  for (let second = 0; second <= seconds; second += step)
    parts.push(`<line x1="${second * scale}" x2="${second * scale}" y1="0" y2="${top + 4}" ` +
      `stroke="#999" stroke-width="0.5"/><text x="${second * scale + 2}" y="${top + 13}">` +
      `${second} s</text>`);
  return `<svg viewBox="0 0 ${AXIS} ${top + 20}">${parts.join('')}</svg>`;
}
update();
})();
