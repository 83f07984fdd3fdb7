// Filters of the answers in the page of `evaluate report`, and clips that several answers share.
'use strict';
(function () {
document.querySelectorAll('[data-same]').forEach(later => {
  later.src = document.querySelector(`[data-embedded="${later.dataset.same}"]`).src;
});
const rows = [...document.querySelectorAll('#list details')];
const controls = document.getElementById('controls'), counts = new Map();
const tags = new Map(rows.map(row => [row, row.dataset.tags.split('\n')]));
tags.forEach(some => some.forEach(tag => counts.set(tag, (counts.get(tag) || 0) + 1)));
// One list of choices for what stands before ": " in the tags.
const keys = [...new Set([...counts.keys()].map(tag => tag.slice(0, tag.indexOf(': '))))];
const selects = keys.map(key => {
  const box = document.createElement('select');
  box.append(new Option(key + ': all', ''));
  [...counts].filter(([tag]) => tag.startsWith(key + ': ')).sort()
    .forEach(([tag, n]) => box.append(new Option(tag + ' (' + n + ')', tag)));
  return box;
});
const order = document.createElement('select'), search = document.createElement('input');
order.append(new Option('as in the data', ''), new Option('worst first', 'worst'));
search.type = 'search';
search.placeholder = 'search in all texts';
const shown = document.createElement('small');
function update() {
  const wanted = selects.map(box => box.value).filter(tag => tag);
  const text = search.value.trim().toLowerCase();
  let count = 0;
  rows.forEach(row => {
    row.hidden = !wanted.every(tag => tags.get(row).includes(tag)) ||
      (text && !row.textContent.toLowerCase().includes(text));
    count += !row.hidden;
  });
  shown.textContent = count + ' of ' + rows.length;
}
order.addEventListener('change', () => document.getElementById('list').append(
  ...(order.value ? [...rows].sort((a, b) => a.dataset.credit - b.dataset.credit) : rows)));
let waiting;
search.addEventListener('input', () => {
  clearTimeout(waiting);
  waiting = setTimeout(update, 150);
});
selects.forEach(box => box.addEventListener('change', update));
controls.append(...selects, order, search, shown);
update();
})();
