'use strict';
// The page of one run. Each section is a function of the report that gives an element, or null where the
// report says nothing about it.

const UNITS = {
  time: { name: 'time', title: 'time of one run, one thread', format: format.seconds },
  macs: { name: 'MACs', title: 'multiply-accumulates of one sample', format: format.count },
  bytes: { name: 'bytes', title: 'bytes of the weights', format: format.bytes },
  parameters: { name: 'parameters', title: 'numbers that are kept', format: format.count },
};
const COST_NAMES = { macs: 'MACs', parameters: 'parameters', bytes: 'bytes', latency: 'time' };
const LEAST_ERROR = 1e-7; // what is drawn of smaller ones: rounding alone
const SHAPE_OF = { channel: 'circle', 'channel-in': 'square', spatial: 'up', tucker: 'diamond', dense: 'down', width: 'down' };

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function base(path) {
  return String(path ?? '').split(/[\\/]/).pop();
}

function section(title, lead, ...children) {
  return html('section', {}, html('h2', {}, title), lead ? html('p', { class: 'lead' }, lead) : null, ...children);
}

/** The layers as the page needs them: rows of the report joined with their details. */
function joined(report) {
  const details = new Map((report.details?.layers ?? []).map((entry) => [entry.output, entry]));
  return report.layers.map((row, index) => {
    const extra = details.get(row.output) ?? {};
    const cut = row.gives || row.reads;
    const left = row.form === 'dense' && !Object.keys(row.weights ?? {}).length && !cut;
    const layer = { ...row, ...extra, index, left, label: formOf(row) };
    if (left) layer.seconds_after = layer.seconds_before; // whatever was planned
    layer.share = layer.sensitivity && row.error ? layer.sensitivity * row.error : 0;
    return layer;
  });
}

/** Gives every layer a short name for the list, without what all share, where that tells it from the others. */
function callShort(layers) {
  const paths = layers.map((layer) => shortName(layer.name, layer.op).split('/'));
  let shared = 0;
  while (paths.length > 1 && paths.every((path) => path.length > shared + 1 && path[shared] === paths[0][shared])) shared += 1;
  const times = new Map();
  layers.forEach((layer, index) => {
    layer.short = paths[index].slice(shared).join('/');
    times.set(layer.short, (times.get(layer.short) ?? 0) + 1);
  });
  for (const layer of layers) if (times.get(layer.short) > 1) layer.short = layer.name;
}

/** Exporters write paths: /layer1/layer1.0/conv1/Conv is layer1.0/conv1. */
function shortName(name, op) {
  const parts = name.split('/').filter(Boolean);
  if (parts.length > 1 && parts[parts.length - 1].replace(/_\d+$/, '') === op) parts.pop();
  return parts.filter((part, index) => !(parts[index + 1] ?? '').startsWith(part + '.')).join('/');
}

/** The form of the weight, and how many channels are left where some were cut. */
function formOf(row) {
  const kept = row.gives ?? row.reads;
  if (!kept) return writtenAs(row);
  const width = `width ${kept[0]} of ${kept[1]}`;
  const written = writtenAs(row);
  return written === 'dense' ? width : `${written}, ${width}`;
}

function writtenAs(row) {
  const weights = Object.keys(row.weights ?? {});
  if (weights.length || row.entries) {
    const low = row.rank ? `${row.form} ${row.rank}` : '';
    const codes = weights.length > 1 ? weights.join('/') : weights[0];
    const sparse = row.nonzeros ? `S ${format.integer(row.nonzeros)} ${row.entries}` : '';
    return [[low, codes].filter(Boolean).join(' '), sparse].filter(Boolean).join(' + ');
  }
  if (row.form === 'dense' && !row.nonzeros) return 'dense';
  const sparse = row.of ? `${row.kept}:${row.of}` : row.nonzeros ? `S ${format.integer(row.nonzeros)}` : '';
  const low = row.rank ? `${row.form} ${row.rank}` : '';
  return [low, sparse].filter(Boolean).join(' + ') || row.form;
}

function amounts(layer, unit) {
  if (unit === 'time') return [layer.seconds_before, layer.seconds_after];
  return [layer[unit + '_before'], layer[unit + '_after']];
}

// ---- head

const THEMES = ['auto', 'light', 'dark'];

function themeButton() {
  let theme = 'auto';
  try { theme = localStorage.getItem('onnx-lrsd-theme') ?? 'auto'; } catch { /* a file may have no storage */ }
  const button = html('button', { type: 'button', class: 'theme' });
  const show = () => {
    if (theme === 'auto') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener('click', () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem('onnx-lrsd-theme', theme); } catch { /* it holds for this page alone */ }
    show();
  });
  show();
  return button;
}

function promiseText(promise, cost) {
  const { kind, asked, got } = promise;
  if (kind === 'ratio') {
    const less = cost === 'latency' ? 'less time' : `fewer ${COST_NAMES[cost] ?? cost}`;
    return `${asked}${THIN}\u00d7 ${less} asked, ${format.times(got)} got`;
  }
  if (kind === 'max_error') return `output error of at most ${Number((100 * asked).toPrecision(6))}${THIN}% asked, ${format.error(got)} got`;
  if (kind === 'max_drop') return `drop of at most ${asked} points asked, ${format.signed(got, 2).replace('+', '')} got`;
  return `${kind} ${asked} asked, ${got} got`;
}

function head(report) {
  const { model, calibration, promise } = report;
  const title = html('h1', {}, base(model.input));
  if (model.output) title.append(html('span', { class: 'arrow' }, ' \u2192 '), base(model.output));
  const samples = calibration.samples ? plural(calibration.samples, 'sample') : 'no samples';
  const source = calibration.source ? ` of ${base(calibration.source)}` : '';
  return html('header', {},
    html('div', { class: 'top' }, html('span', {}, `onnx-lrsd ${report.tool.version}`), themeButton()),
    title,
    html('p', { class: 'soft' }, `For ${report.target}, calibrated on ${samples}${source}`),
    promise ? html('p', { class: 'verdict ' + (promise.kept ? 'kept' : 'broken') },
      html('b', {}, promise.kept ? '\u2713 Promise kept' : '\u2715 Promise not kept'),
      html('span', {}, promiseText(promise, report.cost))) : null,
    report.after ? null : html('p', { class: 'verdict' }, html('b', {}, 'A plan only'), html('span', {}, 'nothing was rewritten or measured.')),
    notes(report),
  );
}

function notes(report) {
  if (!report.warnings?.length) return null;
  return html('ul', { class: 'notes', 'aria-label': 'Warnings' }, report.warnings.map((warning) => html('li', {}, warning)));
}

// ---- before and after

function figure(name, big, change, left, ...remarks) {
  return html('div', { class: 'figure' },
    html('dt', {}, name),
    html('dd', {},
      html('div', { class: 'big' }, big),
      left === null ? null : html('div', { class: 'gauge', 'aria-hidden': 'true' }, html('i', { style: { width: Math.min(100 * left, 100) + '%' } })),
      change ? html('div', { class: 'change' }, change) : null,
      remarks.filter(Boolean).map((remark) => html('div', { class: 'remark' }, remark))));
}

function figures(report) {
  const { before, after, ratio, outputs, metric } = report;
  if (!before || !after) return null;
  const list = html('dl', { class: 'figures', 'aria-label': 'Before and after' });
  const pair = (one, two, unit) => `${unit(one)} \u2192 ${unit(two)}`;
  if (before.latency_ms && after.latency_ms) {
    const [low, high] = ratio.latency.interval ?? [];
    list.append(figure(ratio.latency.device === 'cuda' ? 'Latency (GPU)' : 'Latency', format.times(ratio.latency.median), pair(before.latency_ms, after.latency_ms, format.milliseconds),
      after.latency_ms / before.latency_ms,
      low ? `${low.toFixed(2)} to ${high.toFixed(2)} at 95${THIN}%` : null,
      report.cost === 'latency' && report.predicted?.latency ? `${report.predicted.latency.toFixed(2)} predicted` : null));
  }
  for (const [name, key, unit] of [['MACs', 'macs', format.count], ['Parameters', 'parameters', format.count], ['Size', 'bytes', format.bytes]]) {
    list.append(figure(name, after[key] ? format.times(before[key] / after[key]) : '\u2013', pair(before[key], after[key], unit), before[key] ? after[key] / before[key] : null,
      key === 'macs' && before.not_counted?.length ? `not counted: ${before.not_counted.join(', ')}` : null));
  }
  if (metric) {
    const points = 100 * (metric.after - metric.before);
    const [low, high] = metric.interval.map((bound) => format.signed(100 * bound, 2));
    list.append(figure(metric.name, `${format.signed(points, 2)} points`, `${(100 * metric.before).toFixed(2)} \u2192 ${(100 * metric.after).toFixed(2)}${THIN}%`, null,
      `${low} to ${high} at 95${THIN}%, ${plural(metric.samples, 'sample')}`));
  }
  if (outputs.length) {
    const parts = outputs.flatMap(partsOf);
    const worst = parts.reduce((a, b) => ((b.relative_error ?? Infinity) > (a.relative_error ?? Infinity) ? b : a));
    const alone = parts.length === 1 ? shorten(worst.name, 26) : `${shorten(worst.name, 26)}, the worst of ${parts.length}`;
    const where = worst.relative_error === 0 && parts.length > 1 ? `all ${parts.length} outputs` : alone;
    const sure = worst.interval && worst.relative_error > 0 ? `${format.error(worst.interval[0])} to ${format.error(worst.interval[1])} at 95${THIN}%` : null;
    list.append(figure('Output error', format.error(worst.relative_error), where, null, sure, `of its ${worst.of ?? 'variance'}${checkedOn(report)}`));
  }
  return list;
}

/** Which samples the error was measured on; reports of two models that the user compares do not say it here. */
function checkedOn(report) {
  if (report.data) return '';
  const { samples, given } = report.checked_on ?? {};
  if (!samples) return ', on samples kept apart';
  return samples < given ? `, on ${format.integer(samples)} of ${plural(given, 'sample')}, drawn at random` : `, on ${plural(samples, 'sample')}`;
}

/** What an output is judged by: groups of its channels, or the whole. */
function partsOf(output) {
  if (!output.groups?.length) return [{ ...output, interval: output.error_interval }];
  return output.groups.map((group) => ({ ...group, of: output.of }));
}

// ---- the whole model's trade-off

function tradeOff(report) {
  const found = report.details?.trade_off;
  if (!found || (!found.predicted.length && !found.tried.length)) return null;
  const cost = COST_NAMES[found.cost] ?? found.cost;
  const { tried, chosen } = found;
  const predicted = found.predicted.filter((p) => p.error <= 1); // beyond the variance nothing is predicted
  const every = [...predicted, ...tried, ...(chosen ? [chosen] : [])].filter((p) => p.error > 0 && p.ratio > 0);
  if (!every.length) return null;
  const promise = report.promise;
  const limit = promise?.kind === 'max_error' ? promise.asked : null;
  const aim = promise?.kind === 'ratio' ? promise.asked : null;
  const ratios = [1, ...every.map((p) => p.ratio), ...(aim ? [aim] : [])];
  const says = (p, what) => `${format.times(p.ratio)} fewer ${cost}\n${format.error(p.error)} output error, ${what}`;
  const others = tried.filter((p) => !(chosen && p.ratio === chosen.ratio && p.error === chosen.error) && p.error > 0);
  const chart = plot((width) => ({
    height: Math.min(340, Math.max(240, width * 0.42)),
    label: `Output error over how many times fewer ${cost} the model has: predicted, measured and chosen`,
    x: { domain: [Math.min(...ratios) / 1.04, Math.max(...ratios) * 1.04], log: true, format: (v) => format.tick(v) + THIN + '\u00d7', title: `times fewer ${cost}`, ticks: niceRatios(Math.max(...ratios), width) },
    y: { domain: domain([...every.map((p) => p.error), ...(limit ? [limit] : [])], true), log: true, format: format.percentTick, title: 'output error, share of its variance' },
    marks: [
      limit ? { kind: 'rule', y: limit, text: `asked: at most ${Number((100 * limit).toPrecision(4))}${THIN}%` } : null,
      aim ? { kind: 'rule', x: aim, text: `asked: ${aim}${THIN}\u00d7` } : null,
      { kind: 'line', points: predicted.filter((p) => p.error > 0).map((p) => [p.ratio, p.error]) },
      { kind: 'dots', class: 'hollow', radius: 2.4, points: predicted.filter((p) => p.error > 0).map((p) => ({ x: p.ratio, y: p.error, text: says(p, 'predicted') })) },
      { kind: 'dots', class: 'accent hollow', radius: 4, points: others.map((p) => ({ x: p.ratio, y: p.error, text: says(p, 'measured in the search') })) },
      chosen && chosen.error > 0 ? { kind: 'dots', class: 'accent', radius: 4.5, points: [{ x: chosen.ratio, y: chosen.error, text: says(chosen, 'measured, this model') }] } : null,
      chosen && chosen.error > 0 ? { kind: 'ring', x: chosen.ratio, y: chosen.error, text: 'this model' } : null,
    ].filter(Boolean),
  }));
  const rows = [...tried.map((p) => ({ ...p, what: 'tried' })), ...(chosen ? [{ ...chosen, what: 'this model' }] : [])]
    .sort((a, b) => a.ratio - b.ratio);
  const table = html('table', { class: 'plain' },
    html('caption', { class: 'visually-hidden' }, 'Models that were measured'),
    html('thead', {}, html('tr', {}, html('th', { class: 'number', scope: 'col' }, `fewer ${cost}`), html('th', { class: 'number', scope: 'col' }, 'output error'), html('th', { scope: 'col' }, 'measured'))),
    html('tbody', {}, rows.map((p) => html('tr', {}, html('td', { class: 'number' }, format.times(p.ratio)), html('td', { class: 'number' }, format.error(p.error)),
      html('td', {}, p.what === 'tried' ? 'in the search' : html('b', {}, 'this model'))))));
  const key = html('ul', { class: 'legend' },
    html('li', {}, html('span', { class: 'key' }, legendGlyph('circle', 'hollow'), 'predicted')),
    others.length ? html('li', {}, html('span', { class: 'key' }, legendGlyph('circle', 'accent hollow'), 'measured in the search')) : null,
    chosen?.error > 0 ? html('li', {}, html('span', { class: 'key' }, legendGlyph('circle', 'accent'), 'measured, this model')) : null);
  return section('What more or less would cost',
    'Predicted: what the plan of each size is expected to lose, by the sensitivities of its layers, before the refit wins some of it back. Measured: on samples that were not fitted to, the upper end of the 95\u202f% interval, which promises are held by.',
    rows.length > 1 ? html('div', { class: 'two' }, html('div', {}, key, chart), html('div', { class: 'scroll' }, table)) : html('div', {}, key, chart));
}

function niceRatios(most, width) {
  const all = width < 420 ? [1, 1.5, 2, 3, 5, 8, 12, 20] : [1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30];
  return all.filter((tick) => tick <= Math.max(most, 1.5) * 1.02);
}

function legendGlyph(shape, classes) {
  return svg('svg', { viewBox: '-6 -6 12 12', 'aria-hidden': 'true' }, glyph(shape, classes, 0, 0, 3.6));
}

// ---- layers

const COLUMNS = [
  { key: 'name', title: 'Layer', class: 'name', of: (layer) => layer.name, text: true, width: '' },
  { key: 'op', title: 'Op', class: 'op', of: (layer) => layer.op, text: true, width: '62px' },
  { key: 'form', title: 'Form', class: 'form', of: (layer) => layer.label, text: true, width: '112px' },
  { key: 'amount', title: '', class: 'amount', width: '104px' },
  { key: 'ratio', title: 'Ratio', class: 'number ratio', width: '70px' },
  { key: 'error', title: 'Error', class: 'number error', of: (layer) => layer.error, width: '78px' },
];

/** Wide enough for every form where the names leave room, in CSS; letters are about 7 pixels wide. */
function formWidth(layers) {
  const longest = (texts) => Math.max(...texts.map((text) => text.length));
  const wanted = 14 + 7 * longest(layers.map((layer) => layer.label));
  const free = 268 - 14 - 8 * longest(layers.map((layer) => layer.short));
  return `${Math.max(112, Math.min(wanted, free))}px`;
}

function layersSection(report, layers, marks) {
  const known = layers.filter((layer) => layer.macs_before > 0);
  if (!known.length) return null;
  callShort(known);
  const units = Object.keys(UNITS).filter((unit) => known.some((layer) => amounts(layer, unit)[0] > 0));
  const first = report.target === 'size' ? 'bytes' : units.includes('time') ? 'time' : 'macs';
  const state = { unit: first, sort: 'order', down: false, text: '', which: 'all', picked: null };
  const body = html('tbody', {});
  const detail = html('div', { class: 'picked', 'aria-label': 'The picked layer', role: 'region' });
  const count = html('span', { class: 'count', role: 'status' });
  const most = {};
  for (const unit of units) most[unit] = Math.max(...known.map((layer) => Math.max(...amounts(layer, unit).map((v) => v ?? 0))));

  const rows = new Map(known.map((layer) => [layer, rowOf(layer)]));
  let shown = [];
  let letters = 24; // of a name, as many as its column is wide

  function rowOf(layer) {
    const box = html('input', { type: 'checkbox', tabindex: '-1', 'aria-label': `Exclude ${layer.name}` });
    box.addEventListener('change', () => marks.toggle(layer));
    const row = html('tr', { role: 'row', tabindex: '-1', 'aria-selected': 'false', class: layer.left ? 'left' : '', 'data-name': layer.name });
    row.box = box;
    row.addEventListener('click', (event) => { if (event.target !== box) pick(layer, true); });
    return row;
  }

  function fill(layer) {
    const row = rows.get(layer);
    const [before, after] = amounts(layer, state.unit);
    const unit = UNITS[state.unit];
    const percent = (value) => (100 * (value ?? 0)) / most[state.unit] + '%';
    const title = before > 0 ? `${unit.format(before)} \u2192 ${unit.format(after ?? before)}` : 'not known';
    row.replaceChildren(
      html('td', { role: 'gridcell', class: 'name', title: layer.name }, shorten(layer.short, letters)),
      html('td', { role: 'gridcell', class: 'op' }, layer.op),
      html('td', { role: 'gridcell', class: 'form', title: layer.left ? layer.reason : layer.label }, layer.label),
      html('td', { role: 'gridcell', title }, html('div', { class: 'bar' }, html('span', { class: 'visually-hidden' }, title),
        html('i', { class: 'before', style: { width: percent(before) } }), html('i', { class: 'after', style: { width: percent(after) } }))),
      html('td', { role: 'gridcell', class: 'number ratio' }, before > 0 && after > 0 && !layer.left ? format.times(before / after) : '\u2013'),
      html('td', { role: 'gridcell', class: 'number error' }, layer.error > 0 ? format.error(layer.error) : '\u2013'),
      html('td', { role: 'gridcell', class: 'mark' }, row.box));
  }

  const table = html('table', { role: 'grid', 'aria-label': 'Layers: arrow keys pick one, x excludes it', 'aria-multiselectable': 'false' });
  const headers = COLUMNS.map((column) => {
    const button = html('button', { type: 'button' }, column.title);
    const header = html('th', { role: 'columnheader', scope: 'col', class: column.class.replace('name', '') }, button);
    header.style.width = column.key === 'form' ? formWidth(known) : column.width;
    button.addEventListener('click', () => {
      if (state.sort !== column.key) [state.sort, state.down] = [column.key, !column.text];
      else if (state.down === !column.text) state.down = !state.down;
      else [state.sort, state.down] = ['order', false];
      arrange();
    });
    column.header = header;
    column.button = button;
    return header;
  });
  table.append(html('thead', { role: 'rowgroup' }, html('tr', { role: 'row' }, headers,
    html('th', { role: 'columnheader', scope: 'col', class: 'mark', style: { width: '34px' } }, html('span', { class: 'visually-hidden' }, 'Exclude')))), body);

  function value(layer) {
    const [before, after] = amounts(layer, state.unit);
    if (state.sort === 'amount') return before ?? 0;
    if (state.sort === 'ratio') return before > 0 && after > 0 ? before / after : 0;
    if (state.sort === 'order') return layer.index;
    return COLUMNS.find((column) => column.key === state.sort).of(layer) ?? 0;
  }

  function arrange() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const says = (layer) => `${layer.name} ${layer.op} ${layer.label} ${layer.reason}`.toLowerCase();
    shown = known.filter((layer) => (state.which === 'all' || (state.which === 'left') === layer.left) && words.every((word) => says(layer).includes(word)));
    shown.sort((a, b) => {
      const [one, two] = [value(a), value(b)];
      const order = typeof one === 'string' ? one.localeCompare(two, 'en', { numeric: true }) : one - two;
      return (state.down ? -order : order) || a.index - b.index;
    });
    for (const layer of shown) fill(layer);
    body.replaceChildren(...shown.map((layer) => rows.get(layer)));
    if (!shown.length) body.append(html('tr', { role: 'row' }, html('td', { role: 'gridcell', colspan: '7', class: 'empty' }, 'No layer is so named.')));
    count.textContent = shown.length === known.length ? plural(known.length, 'layer') : `${shown.length} of ${plural(known.length, 'layer')}`;
    for (const column of COLUMNS) {
      if (column.key === 'amount') column.button.textContent = capital(UNITS[state.unit].name);
      if (state.sort === column.key) column.header.setAttribute('aria-sort', state.down ? 'descending' : 'ascending');
      else column.header.removeAttribute('aria-sort');
    }
    if (shown.length && !shown.includes(state.picked)) pick(shown[0], false);
    reach();
  }

  /** One row can be reached with the tab key: the picked one. */
  function reach() {
    for (const [layer, row] of rows) {
      row.tabIndex = layer === state.picked ? 0 : -1;
      row.setAttribute('aria-selected', String(layer === state.picked));
    }
  }

  function pick(layer, focus) {
    state.picked = layer;
    reach();
    detail.replaceChildren(...layerDetail(layer, state.unit, report));
    if (focus) {
      const row = rows.get(layer);
      row.focus({ preventScroll: true });
      row.scrollIntoView({ block: 'nearest' });
    }
  }

  table.addEventListener('keydown', (event) => {
    if (event.target.closest('thead') || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = shown.indexOf(state.picked);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      const next = shown[Math.min(Math.max(at + moves[event.key], 0), shown.length - 1)];
      if (next) pick(next, true);
    } else if ((event.key === 'x' || event.key === ' ') && state.picked) {
      marks.toggle(state.picked);
    } else return;
    event.preventDefault();
  });
  marks.watch(() => {
    for (const [layer, row] of rows) row.box.checked = marks.has(layer);
  });

  const search = html('input', { type: 'search', placeholder: 'Filter by name, op or form', 'aria-label': 'Filter layers' });
  search.addEventListener('input', () => { state.text = search.value; arrange(); });
  const which = html('select', { 'aria-label': 'Which layers' },
    html('option', { value: 'all' }, 'all layers'), html('option', { value: 'changed' }, 'rewritten'), html('option', { value: 'left' }, 'left dense'));
  which.addEventListener('change', () => { state.which = which.value; arrange(); });
  const buttons = units.map((unit) => {
    const button = html('button', { type: 'button', 'aria-pressed': String(unit === state.unit), title: UNITS[unit].title }, UNITS[unit].name);
    button.addEventListener('click', () => {
      state.unit = unit;
      for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
      arrange();
      if (state.picked) pick(state.picked, false);
    });
    return button;
  });
  const tools = html('div', { class: 'tools' }, search, which, html('div', { class: 'switch', role: 'group', 'aria-label': 'Unit of the bars' }, buttons), count);
  const hint = html('p', { class: 'hint' }, html('kbd', {}, '\u2191'), ' ', html('kbd', {}, '\u2193'), ' pick a layer, ', html('kbd', {}, 'x'), ' puts it on the list to exclude');
  const largest = (layer) => (amounts(layer, state.unit)[0] ?? 0) + (layer.left ? 0 : most[state.unit]);
  state.picked = known.reduce((a, b) => (largest(b) > largest(a) ? b : a));
  arrange();
  pick(state.picked, false);
  new ResizeObserver(() => {
    const room = Math.max(Math.floor((headers[0].clientWidth - 16) / 7.55), 8);
    if (room === letters) return;
    letters = room;
    for (const [layer, row] of rows) if (row.isConnected) row.cells[0].textContent = shorten(layer.short, letters);
  }).observe(headers[0]);
  return section('Layers', 'Grey is the layer as it was, colour what is left of it. The error is that of the layer\u2019s own output, as a share of its variance; click a column to sort.',
    tools, html('div', { class: 'workbench' }, html('div', {}, html('div', { class: 'list' }, table), hint), detail));
}

function layerDetail(layer, unit, report) {
  const shape = layer.shape?.length ? layer.shape.join(' \u00d7 ') : '';
  const change = (key) => {
    const [before, after] = amounts(layer, key);
    if (!(before > 0)) return null;
    const text = !after || after === before ? UNITS[key].format(before) : `${UNITS[key].format(before)} \u2192 ${UNITS[key].format(after)}`;
    return html('div', {}, html('dt', {}, key === 'time' && !layer.left ? 'time, predicted' : UNITS[key].name), html('dd', {}, text));
  };
  const fact = (name, text) => html('div', {}, html('dt', {}, name), html('dd', {}, text));
  const facts = html('dl', { class: 'facts' }, ['time', 'macs', 'bytes', 'parameters'].map(change),
    layer.error > 0 ? errorFact(layer, fact) : null,
    layer.network_error > 0 ? fact('in the network', format.error(layer.network_error)) : null,
    layer.sensitivity ? fact('sensitivity', String(Number(layer.sensitivity.toPrecision(2)))) : null,
    layer.share > 0 ? fact('adds to output error', format.error(layer.share)) : null);
  const panels = [curvePanel(layer, unit), spectrumPanel(layer), histogramPanel(layer), picturePanel(layer)].filter(Boolean);
  return [
    html('h3', { class: 'name', 'aria-live': 'polite' }, layer.name),
    html('p', { class: 'what' }, [layer.op, shape, layer.left ? `left dense: ${layer.reason}` : layer.label].filter(Boolean).join(', ')),
    facts,
    panels.length ? html('div', { class: 'panels' }, panels) : null,
  ].filter(Boolean);
}

/** The layer's own error: as its curve had it, and as it was fitted. */
function errorFact(layer, fact) {
  const planned = layer.left ? undefined : layer.curve?.errors[layer.curve.forms.indexOf(layer.planned)];
  if (!planned) return fact('layer error', format.error(layer.error));
  return fact('layer error, planned and got', `${format.error(planned)} \u2192 ${format.error(layer.error)}`);
}

function panel(title, classes, ...children) {
  return html('figure', { class: 'panel ' + classes }, html('h4', {}, title), ...children);
}

/** The kind of a group of forms, and whether S goes with it. */
function kindOf(group) {
  const [low, sparse] = group.split(' + ');
  return { shape: SHAPE_OF[low] ?? 'cross', hollow: Boolean(sparse) };
}

function curvePanel(layer, unit) {
  const curve = layer.curve;
  if (!curve?.forms.length) return null;
  const key = unit === 'time' ? 'seconds' : unit;
  const dense = amounts(layer, unit)[0];
  const costs = curve[key];
  if (!(dense > 0) || costs.some((cost) => cost === null)) return unit === 'macs' ? null : curvePanel(layer, 'macs');
  const points = curve.forms.map((form, i) => ({ form, group: curve.groups[i], x: costs[i] / dense, y: Math.max(curve.errors[i], LEAST_ERROR) }));
  const chosen = layer.left ? null : points.find((p) => p.form === layer.planned);
  const groups = [...new Set(points.map((p) => p.group))].sort((a, b) => lowest(points, a) - lowest(points, b));
  let shown = chosen?.group ?? null;
  const chart = plot((width) => ({
    height: Math.max(220, Math.min(270, width * 0.55)),
    label: `Error of ${layer.name} over its ${UNITS[unit].name}, for ${groups.join(', ')}`,
    x: { domain: [0, roomFor(Math.max(...points.map((p) => p.x)))], format: (v) => format.tick(100 * v) + THIN + '%', title: `${UNITS[unit].name} left of the dense layer` },
    y: { domain: domain(points.map((p) => p.y), true), log: true, format: format.percentTick, title: 'error of the layer\u2019s output' },
    marks: [
      ...[...groups].reverse().sort((a, b) => (a === shown) - (b === shown)).flatMap((group) => {
        const { shape, hollow } = kindOf(group);
        const own = points.filter((p) => p.group === group);
        const accent = group === shown;
        const dim = shown !== null && !accent ? ' dim' : '';
        return [
          { kind: 'line', class: (accent ? 'accent' : '') + dim, points: front(own) },
          { kind: 'dots', shape, radius: 2.7, class: [accent ? 'accent' : '', hollow ? 'hollow' : '', dim].join(' '),
            points: own.map((p) => ({ x: p.x, y: p.y, text: `${p.form}\n${format.share(p.x)} of the ${UNITS[unit].name}, ${format.error(p.y)} error` })) },
        ];
      }),
      chosen ? { kind: 'ring', x: chosen.x, y: chosen.y, text: chosen.form, falling: true } : null,
    ].filter(Boolean),
  }));
  const keys = html('ul', { class: 'legend', 'aria-label': 'Forms' }, groups.map((group) => {
    const { shape, hollow } = kindOf(group);
    const button = html('button', { type: 'button', 'aria-pressed': String(group === shown) }, legendGlyph(shape, hollow ? 'hollow' : ''), group);
    button.addEventListener('click', () => {
      shown = shown === group ? null : group;
      for (const item of keys.querySelectorAll('button')) item.setAttribute('aria-pressed', String(item === button && shown !== null));
      chart.draw();
    });
    return html('li', {}, button);
  }));
  return panel('What each form would cost and lose', 'wide curves', keys, chart);
}

/** The end of an axis of shares: the whole, unless all of it lies far below. */
function roomFor(share) {
  return share > 0.5 ? Math.max(1, share) * 1.02 : share * 1.15;
}

function lowest(points, group) {
  return Math.min(...points.filter((p) => p.group === group).map((p) => p.y * p.x));
}

/** The points that no cheaper one beats, cheapest first. */
function front(points) {
  const found = [];
  for (const p of [...points].sort((a, b) => a.x - b.x || a.y - b.y)) {
    if (!found.length || p.y < found[found.length - 1][1]) found.push([p.x, p.y]);
  }
  return found;
}

function spectrumPanel(layer) {
  const found = layer.spectrum;
  if (!found || found.ranks.length < 2) return null;
  const { ranks } = found;
  const least = 1e-6;
  const line = (values) => ranks.map((rank, i) => [rank, Math.max(values[i], least)]).filter(([, value]) => value > least);
  const squares = found.values.map((value) => value * value);
  const every = [...line(found.left), ...line(squares)].map(([, value]) => value);
  return panel('Spectrum of the whitened weight', 'spectrum',
    html('ul', { class: 'legend' },
      html('li', {}, html('span', { class: 'key' }, lineGlyph('accent'), 'energy left')),
      html('li', {}, html('span', { class: 'key' }, lineGlyph(''), '(\u03c3/\u03c3\u2081)\u00b2'))),
    plot(() => ({
      height: 200,
      label: `Singular values of the whitened weight of ${layer.name}, and the energy beyond each rank`,
      x: { domain: [1, ranks[ranks.length - 1]], log: true, format: format.tick, title: 'rank' },
      y: { domain: domain(every, true), log: true, format: format.percentTick, title: '' },
      marks: [
        { kind: 'line', points: line(squares) },
        { kind: 'line', class: 'accent', points: line(found.left) },
        layer.form.startsWith('channel') && layer.rank > 0 && layer.rank <= ranks[ranks.length - 1] ? { kind: 'rule', x: layer.rank, text: `${layer.form} ${layer.rank}` } : null,
      ].filter(Boolean),
    })));
}

function lineGlyph(classes) {
  return svg('svg', { viewBox: '0 0 12 12', 'aria-hidden': 'true' }, svg('path', { class: 'line ' + classes, d: 'M0,6H12' }));
}

function histogramPanel(layer) {
  const found = layer.histogram;
  if (!found) return null;
  const { low, high, before, after } = found;
  return panel('Outputs before and after', 'histogram',
    html('ul', { class: 'legend' },
      html('li', {}, html('span', { class: 'key' }, svg('svg', { viewBox: '0 0 12 12', 'aria-hidden': 'true' }, svg('rect', { class: 'area', y: 2, width: 12, height: 9 })), 'before')),
      html('li', {}, html('span', { class: 'key' }, lineGlyph('accent'), 'after'))),
    plot(() => ({
      height: 200,
      label: `Histogram of the outputs of ${layer.name} before and after`,
      x: { domain: [low, high], format: format.tick, title: 'value of an output' },
      y: { domain: [0, Math.max(...before, ...after) * 1.06], format: format.percentTick, title: '' },
      marks: [
        { kind: 'steps', low, high, values: before, filled: true },
        { kind: 'steps', low, high, values: after, class: 'accent' },
      ],
    })));
}

function picturePanel(layer) {
  const found = layer.picture;
  if (!found) return null;
  const channels = found.kind === 'channels';
  const kept = [...found.cells.join('')].filter((digit) => digit !== '0').length;
  const text = channels ? `${kept} of ${found.shape[0]} input channels are kept in full`
    : `${format.integer(layer.nonzeros)} of ${format.integer(found.shape[0] * found.shape[1])} entries (${format.share(layer.nonzeros / (found.shape[0] * found.shape[1]))})`;
  const rows = found.cells.length;
  return panel(channels ? 'Channels that S keeps' : 'Where S has entries', 'wide picture',
    cells(found.cells, text, channels ? 14 * rows : Math.min(190, Math.max(60, 6 * rows))),
    html('p', { class: 'small soft' }, channels ? text : `${text}; ${found.shape[0]} outputs down, ${found.shape[1]} inputs across; the darker, the more.`));
}

// ---- where the error comes from, and what to leave alone

/** Layers to exclude, and who wants to know of them. */
function newMarks() {
  const marked = new Set();
  const watchers = [];
  return {
    has: (layer) => marked.has(layer),
    names: () => [...marked].sort((a, b) => a.index - b.index).map((layer) => layer.name),
    toggle(layer) {
      if (!marked.delete(layer)) marked.add(layer);
      for (const watcher of watchers) watcher();
    },
    set(layers) {
      marked.clear();
      for (const layer of layers) marked.add(layer);
      for (const watcher of watchers) watcher();
    },
    watch(watcher) { watchers.push(watcher); },
  };
}

function sensitivities(report, layers, marks) {
  const known = layers.filter((layer) => layer.sensitivity > 0);
  const shares = known.filter((layer) => layer.share > 0).sort((a, b) => b.share - a.share);
  if (!shares.length) return null;
  const total = shares.reduce((sum, layer) => sum + layer.share, 0);
  const most = shares[0].share;
  const table = html('table', { class: 'plain bars' },
    html('thead', {}, html('tr', {}, html('th', { scope: 'col' }, 'Layer'), html('th', { scope: 'col' }, html('span', { class: 'visually-hidden' }, 'Bar')),
      html('th', { scope: 'col', class: 'number' }, 'Share'), html('th', { scope: 'col', class: 'number' }, 'Layer error'), html('th', { scope: 'col', class: 'number' }, 'Sensitivity'))),
    html('tbody', {}, shares.slice(0, 12).map((layer) => html('tr', {},
      html('td', { class: 'mono', title: layer.name }, shorten(layer.short ?? layer.name, 34)),
      html('td', { class: 'wide' }, html('div', { class: 'bar', style: { width: (100 * layer.share) / most + '%' } })),
      html('td', { class: 'number' }, format.share(layer.share / total)),
      html('td', { class: 'number' }, format.error(layer.error)),
      html('td', { class: 'number' }, String(Number(layer.sensitivity.toPrecision(2))))))));
  const worst = half(shares, total);
  const exclude = html('button', { type: 'button' }, worst.length > 1 ? `Exclude the ${worst.length} layers that bring half of it` : 'Exclude the layer that brings half of it');
  exclude.addEventListener('click', () => marks.set(worst));
  const more = shares.length > 12 ? html('p', { class: 'small soft' }, `and ${shares.length - 12} more, ${format.share(shares.slice(12).reduce((sum, layer) => sum + layer.share, 0) / total)} together`) : null;
  return section('Where the error comes from',
    'The share of the predicted output error that each layer brings: its own error times its sensitivity, which is how much of an error in this layer reaches the outputs.',
    html('div', { class: 'scroll' }, table), more, html('p', { class: 'act' }, exclude));
}

/** The fewest layers that bring half of the error; ``shares`` are in descending order. */
function half(shares, total) {
  let sum = 0;
  return shares.filter((layer) => {
    const wanted = sum < total / 2;
    sum += layer.share;
    return wanted;
  });
}

function leftAlone(report, layers) {
  const left = layers.filter((layer) => layer.left);
  if (!left.length) return null;
  const whole = report.before?.macs ?? 0;
  const share = (members) => {
    const macs = members.reduce((sum, layer) => sum + layer.macs_before, 0);
    return whole && macs ? `${format.share(macs / whole)} of the MACs` : '';
  };
  const items = byReason(left, (layer) => layer.reason || 'no reason given', share);
  return section('Left as they were', `${plural(left.length, 'layer')}, and why.`, html('ul', { class: 'reasons' }, items));
}

/** Layers whose outputs must all stay, so that no channel goes. */
function channelsThatStay(report) {
  const stay = report.whole ?? [];
  if (!stay.length) return null;
  return section('All channels stay', `Of ${plural(stay.length, 'layer')} no output may go, and why.`,
    html('ul', { class: 'reasons' }, byReason(stay, (layer) => layer.kind, () => '')));
}

/** List items: how many layers share a reason, the reason, a note on them, their names. */
function byReason(layers, reasonOf, note) {
  const groups = new Map();
  for (const layer of layers) groups.set(reasonOf(layer), [...(groups.get(reasonOf(layer)) ?? []), layer]);
  return [...groups].sort((a, b) => b[1].length - a[1].length).map(([reason, members]) => {
    const names = members.map((layer) => layer.name).join(', ');
    const few = members.length <= 6 || names.length < 160;
    return html('li', {},
      html('span', { class: 'number' }, String(members.length)),
      html('span', {}, reason),
      html('span', { class: 'number soft' }, note(members)),
      few ? html('span', { class: 'names small mono' }, names)
        : html('details', { class: 'names small' }, html('summary', {}, `${members.slice(0, 3).map((layer) => layer.name).join(', ')} and ${members.length - 3} more`), html('span', { class: 'mono' }, names)));
  });
}

// ---- outputs

function outputsSection(report) {
  const outputs = report.outputs ?? [];
  const rows = outputs.flatMap((output) => {
    const groups = partsOf(output);
    if (groups.length === 1) return [{ ...output, ...groups[0], name: output.name, sub: false }];
    return [{ ...output, sub: false }, ...groups.map((group) => ({ ...group, sub: true }))];
  });
  const sure = rows.some((row) => row.interval);
  if (!rows.length) return null;
  const every = rows.flatMap((row) => [row.relative_error, ...(row.interval ?? [])]).filter((value) => value > 0);
  const [low, high] = domain(every, true);
  const axis = rows.length > 1;
  const at = (value) => Math.min(Math.max(100 * (Math.log(Math.max(value, low)) - Math.log(low)) / (Math.log(high) - Math.log(low)), 0), 100);
  const extra = [['cosine', 'Cosine', (v) => v.toFixed(6)], ['largest', 'Largest difference', (v) => format.tick(v)], ['agreement', 'Same class', format.share]]
    .filter(([key]) => rows.some((row) => row[key] !== undefined && row[key] !== null));
  const table = html('table', { class: 'plain' },
    html('thead', {}, html('tr', {}, html('th', { scope: 'col' }, 'Output'), html('th', { scope: 'col', class: 'number' }, 'Error'), sure ? html('th', { scope: 'col' }, `95${THIN}% interval`) : null,
      axis ? html('th', { scope: 'col', class: 'ends', 'aria-label': 'On a logarithmic axis' }, html('span', {}, format.percentTick(Number(low.toPrecision(1)))), html('span', {}, format.percentTick(Number(high.toPrecision(1))))) : null, extra.map(([, title]) => html('th', { scope: 'col', class: 'number' }, title)))),
    html('tbody', {}, rows.map((row) => html('tr', { class: row.sub ? 'sub' : '' },
      html('td', { class: 'mono', title: row.name }, shorten(row.name, 48)),
      html('td', { class: 'number' }, format.error(row.relative_error)),
      sure ? html('td', { class: 'soft' }, row.interval ? `${format.error(row.interval[0])} to ${format.error(row.interval[1])}` : '') : null,
      axis ? html('td', {}, html('div', { class: 'whisker' },
        row.interval ? html('s', { style: { left: at(row.interval[0]) + '%', width: at(row.interval[1]) - at(row.interval[0]) + '%' } }) : null,
        row.relative_error > 0 ? html('i', { style: { left: at(row.relative_error) + '%' } }) : null)) : null,
      extra.map(([key, , show]) => html('td', { class: 'number' }, row[key] === undefined || row[key] === null ? '' : show(row[key])))))));
  return section('Outputs', 'Squared difference between both models, as a share of the variance of the output.' + (axis ? ' The axis is logarithmic.' : ''), html('div', { class: 'scroll' }, table));
}

// ---- int8, engines, loading

function int8Section(report) {
  const found = report.int8;
  if (!found) return null;
  const steps = Object.entries(found.steps);
  const score = steps.map(([, step]) => step.metric?.name).find(Boolean);
  const table = html('table', { class: 'plain' },
    html('thead', {}, html('tr', {}, html('th', { scope: 'col' }, 'Step'), ['Latency', 'Size', 'Output error', score].filter(Boolean).map((name) => html('th', { scope: 'col', class: 'number' }, name)))),
    html('tbody', {}, steps.map(([name, step]) => html('tr', {},
      html('td', {}, name === found.kept ? html('b', {}, name, ', kept') : name),
      html('td', { class: 'number' }, step.ratio.latency.median ? format.times(step.ratio.latency.median) : '\u2013'),
      html('td', { class: 'number' }, format.times(step.before.bytes / step.after.bytes)),
      html('td', { class: 'number' }, format.error(Math.max(...step.outputs.flatMap(partsOf).map((part) => part.relative_error ?? Infinity)))),
      score ? html('td', { class: 'number' }, step.metric ? `${(100 * step.metric.after).toFixed(2)}${THIN}%` : '') : null))));
  const left = [...found.left].sort((a, b) => b.error - a.error);
  const said = `${plural(found.nodes, 'node')} in int8` + (left.length ? `; ${left.length} in float for the output error of each in int8: ${left.map((entry) => `${entry.name} (${format.error(entry.error)})`).join(', ')}` : '');
  return section('Int8', 'What either step does alone, and what both do.', html('div', { class: 'scroll' }, table), html('p', { class: 'small soft' }, said));
}

function engineSection(report) {
  const found = report.tensorrt;
  if (!found) return null;
  const names = found.sparse.length ? `2:4, for sparse tensor cores: ${found.sparse.join(', ')}` : 'No weight is 2:4.';
  const timed = found.latency;
  const said = timed ? `Engines of TensorRT ${timed.version} on ${timed.device}: ${format.milliseconds(timed.before_ms)} before, ${format.milliseconds(timed.after_ms)} after, ${format.times(timed.median)} (${format.times(timed.interval[0])} to ${format.times(timed.interval[1])} at 95 %). The latency above is that of ONNX Runtime.` : null;
  return section('TensorRT', null, command(found.trtexec), html('p', { class: 'small soft' }, names), said ? html('p', { class: 'small soft' }, said) : null, found.notes.map((note) => html('p', { class: 'small soft' }, note)));
}

// ---- make it again

function command(text, label = 'Copy') {
  const code = html('code', {}, text);
  const button = html('button', { type: 'button' }, label);
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = 'Copied';
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = 'Selected';
    }
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  const box = html('div', { class: 'command' }, code, button);
  box.say = (said) => { code.textContent = said; };
  return box;
}

function again(report, marks) {
  const base = report.details?.command;
  const box = command('');
  const list = html('p', { class: 'small soft' });
  const show = () => {
    const names = marks.names();
    const pattern = `^(?:${names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|')})$`;
    const option = `--exclude ${quoted(pattern)}`;
    box.hidden = !base && !names.length;
    box.say(names.length ? [base, option].filter(Boolean).join(' ') : base ?? '');
    list.textContent = names.length ? `Excluded: ${names.join(', ')}` : 'To leave layers out, mark them in the list above: the command follows.';
  };
  marks.watch(show);
  show();
  return section('Make it again', null, box, list);
}

/** As a POSIX shell wants it. */
function quoted(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'";
}

function runSection(report) {
  const pairs = (entries, wide) => html('dl', { class: 'pairs' }, entries.map(([name, text]) => [html('dt', {}, name), html('dd', {}, text)]));
  const stages = Object.entries(report.seconds ?? {}).filter(([, seconds]) => seconds >= 0.05);
  const longest = Math.max(...stages.map(([, seconds]) => seconds), 1e-9);
  const sum = stages.reduce((total, [, seconds]) => total + seconds, 0);
  const versions = Object.entries(report.versions ?? { 'onnx-lrsd': report.tool.version });
  const machine = Object.entries(report.details?.machine ?? {});
  const found = [];
  if (stages.length) {
    found.push(html('div', {}, html('h3', {}, `Time taken: ${sum.toFixed(1)}${THIN}s`), html('dl', { class: 'pairs' }, stages.map(([name, seconds]) => [html('dt', {}, name),
      html('dd', {}, html('span', { class: 'bar', style: { width: (60 * seconds) / longest + '%' } }), `${seconds.toFixed(1)}${THIN}s`)]))));
  }
  if (machine.length) found.push(html('div', {}, html('h3', {}, 'Machine'), pairs([...machine, ...(report.predicted?.table ? [['times', report.predicted.table]] : [])])));
  found.push(html('div', {}, html('h3', {}, 'Versions'), pairs(versions)));
  if (report.loading) {
    const { before, after } = report.loading;
    found.push(html('div', {}, html('h3', {}, 'Opening the model'), pairs([
      ['time', `${format.seconds(before.seconds)} \u2192 ${format.seconds(after.seconds)}`],
      ['peak memory', `${format.bytes(before.peak_bytes)} \u2192 ${format.bytes(after.peak_bytes)}`]])));
  }
  return section('This run', null, html('div', { class: 'columns' }, found));
}

function reportPage(report) {
  const layers = joined(report);
  const marks = newMarks();
  return [
    head(report), figures(report), tradeOff(report), layersSection(report, layers, marks), sensitivities(report, layers, marks),
    outputsSection(report), int8Section(report), leftAlone(report, layers), channelsThatStay(report), engineSection(report), again(report, marks), runSection(report),
    html('footer', {}, 'Every number here is in the report\u2019s JSON, which this file holds.'),
  ];
}
