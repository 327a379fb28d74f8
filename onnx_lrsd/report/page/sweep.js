'use strict';
// The page of a sweep: what a model can gain, measured, and the last point within the promise.

const GAINS = {
  latency: { name: 'time', title: 'times faster', of: (point) => point.ratio.latency.median, interval: (point) => point.ratio.latency.interval },
  macs: { name: 'MACs', title: 'times fewer MACs', of: (point) => point.ratio.macs },
  bytes: { name: 'bytes', title: 'times smaller', of: (point) => point.ratio.bytes },
  parameters: { name: 'parameters', title: 'times fewer parameters', of: (point) => point.ratio.parameters },
};

function pointName(point) {
  if (point.ratio_asked === null) return 'int8 alone';
  return `${point.ratio_asked}${THIN}\u00d7` + (point.int8 ? ' + int8' : '');
}

function limitText(promise) {
  if (promise.kind === 'max_drop') return `a score that falls by at most ${promise.asked} points`;
  return `an output error of at most ${Number((100 * promise.asked).toPrecision(6))}${THIN}%`;
}

function sweepHead(sweep) {
  const best = sweep.points[sweep.best];
  const samples = sweep.calibration.samples ? plural(sweep.calibration.samples, 'sample') : 'no samples';
  const source = sweep.calibration.source ? ` of ${base(sweep.calibration.source)}` : '';
  const promise = sweep.points[0]?.promise;
  const gained = best ? GAINS[sweep.gains] : null;
  return html('header', {},
    html('div', { class: 'top' }, html('span', {}, `onnx-lrsd ${sweep.tool.version}`), themeButton()),
    html('h1', {}, `What ${base(sweep.model.input)} can gain`),
    html('p', { class: 'soft' }, `For ${sweep.target}, calibrated on ${samples}${source}`),
    promise ? html('p', { class: 'verdict ' + (best ? 'kept' : 'broken') },
      html('b', {}, best ? `\u2713 ${pointName(best)}` : '\u2715 Nothing gained'),
      html('span', {}, best ? `gains most with ${limitText(promise)}: ${format.times(gained.of(best))} ${gained.title.replace('times ', '')}, ${base(best.output)}` : `with ${limitText(promise)}`)) : null,
    notes(sweep));
}

/** Rows of the table; the original stands first. */
function sweepTable(sweep) {
  const first = sweep.points[0];
  const score = first.metric?.name;
  const timed = first.before.latency_ms !== null;
  const heads = ['Model', ...(timed ? ['Latency', 'Faster', `95${THIN}%`] : []), 'MACs', 'Size', 'Output error', `95${THIN}%`, ...(score ? [score, `95${THIN}%`] : []), 'Promise'];
  const number = (text, soft) => html('td', { class: 'number' + (soft ? ' soft' : '') }, text);
  const original = html('tr', { 'data-name': 'as it was' }, html('th', { scope: 'row' }, 'as it was'),
    timed ? [number(format.milliseconds(first.before.latency_ms)), number(''), number('')] : null,
    number(format.count(first.before.macs)), number(format.bytes(first.before.bytes)), number(''), number(''),
    score ? [number((100 * first.metric.before).toFixed(2) + THIN + '%'), number('')] : null, html('td', {}, ''));
  const rows = sweep.points.map((point, index) => {
    const interval = point.ratio.latency.interval;
    const change = point.metric?.interval.map((end) => format.signed(100 * end, 2));
    return html('tr', { 'data-name': pointName(point) },
      html('th', { scope: 'row', title: base(point.output) }, index === sweep.best ? html('b', {}, pointName(point)) : pointName(point)),
      timed ? [number(format.milliseconds(point.after.latency_ms)), number(format.times(point.ratio.latency.median)), number(interval ? `${format.down(interval[0])} to ${format.down(interval[1])}` : '', true)] : null,
      number(format.count(point.after.macs)), number(format.bytes(point.after.bytes)),
      number(format.error(point.error)), number(`${format.error(point.error_interval[0])} to ${format.error(point.error_interval[1])}`, true),
      score ? [number((100 * point.metric.after).toFixed(2) + THIN + '%'), number(`${change[0]} to ${change[1]}`, true)] : null,
      html('td', {}, point.promise.kept ? 'kept' : 'not kept'));
  });
  return html('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Models of the sweep' }, html('table', { class: 'plain' },
    html('thead', {}, html('tr', {}, heads.map((title, place) => html('th', { scope: 'col', class: place && place < heads.length - 1 ? 'number' : '' }, title)))),
    html('tbody', {}, original, rows)));
}

/** One chart of all points: ``value`` of a point over what it gains. */
function sweepChart(sweep, gain, { value, ends, log, format: show, title, label, rule, original }) {
  const known = sweep.points.filter((point) => gain.of(point) > 0 && Number.isFinite(value(point)) && (!log || value(point) > 0));
  if (!known.length) return null;
  const series = [
    { name: 'low rank', shape: 'circle', class: 'accent', points: known.filter((point) => !point.int8), line: 'accent' },
    { name: 'low rank and int8', shape: 'square', class: 'accent hollow', points: known.filter((point) => point.int8 && point.ratio_asked !== null), line: null },
    { name: 'int8 alone', shape: 'diamond', class: '', points: known.filter((point) => point.ratio_asked === null), line: null },
  ].filter(({ points }) => points.length);
  const best = sweep.points[sweep.best];
  const says = (point) => `${pointName(point)}\n${format.times(gain.of(point))} ${gain.title.replace('times ', '')}\n${label}: ${show(value(point))}`;
  const gains = [1, ...known.map(gain.of)];
  const values = [...known.flatMap((point) => [value(point), ...ends(point)]), ...(rule ? [rule.y] : []), ...(original ? [original.y] : [])];
  const chart = plot((width) => ({
    height: Math.min(360, Math.max(250, width * 0.42)),
    label: `${label} over how many ${gain.title} each model is`,
    x: { domain: [Math.min(...gains) / 1.05, Math.max(...gains) * 1.08], log: true, format: (v) => format.tick(v) + THIN + '\u00d7', title: gain.title, ticks: niceRatios(Math.max(...gains), width) },
    y: { domain: domain(values, log), log, format: log ? format.percentTick : show, title },
    marks: [
      rule ? { kind: 'rule', ...rule } : null,
      { kind: 'rule', x: 1, text: original ? '' : 'as it was' },
      ...series.filter(({ line }) => line !== null).map(({ points, line }) => ({ kind: 'line', class: line, points: points.map((point) => [gain.of(point), value(point)]) })),
      { kind: 'line', points: known.filter((point) => point.int8).map((point) => [gain.of(point), value(point)]) },
      ...known.map((point) => ({ kind: 'line', points: ends(point).map((end) => [gain.of(point), end]) })),
      ...series.map(({ shape, class: classes, points }) => ({ kind: 'dots', shape, class: classes, radius: 4, points: points.map((point) => ({ x: gain.of(point), y: value(point), text: says(point) })) })),
      original ? { kind: 'dots', class: 'hollow', radius: 4, points: [{ x: 1, y: original.y, text: 'as it was' }] } : null,
      best && known.includes(best) ? { kind: 'ring', x: gain.of(best), y: value(best), text: pointName(best) } : null,
    ].filter(Boolean),
  }));
  const key = html('ul', { class: 'legend' }, series.map(({ name, shape, class: classes }) => html('li', {}, html('span', { class: 'key' }, legendGlyph(shape, classes), name))));
  return html('div', {}, key, chart);
}

function sweepCurves(sweep) {
  const units = Object.keys(GAINS).filter((unit) => sweep.points.some((point) => GAINS[unit].of(point) > 0));
  const promise = sweep.points[0].promise;
  const scored = sweep.points.every((point) => point.metric);
  const place = html('div', {});
  const show = (unit) => {
    for (const [name, button] of buttons) button.setAttribute('aria-pressed', String(name === unit));
    place.replaceChildren(...[
      sweepChart(sweep, GAINS[unit], {
        value: (point) => point.error, ends: (point) => point.error_interval.map((end) => Math.max(end ?? 0, 1e-12)), log: true, format: format.error,
        title: 'output error, share of its variance', label: 'Output error',
        rule: promise.kind === 'max_error' ? { y: promise.asked, text: `asked: at most ${Number((100 * promise.asked).toPrecision(4))}${THIN}%` } : null,
      }),
      scored ? sweepChart(sweep, GAINS[unit], {
        value: (point) => 100 * point.metric.after, ends: (point) => point.metric.interval.map((end) => 100 * (point.metric.before + end)), log: false,
        format: (v) => format.tick(v) + THIN + '%', title: `${sweep.points[0].metric.name}, with the 95${THIN}% interval of its change`, label: sweep.points[0].metric.name,
        rule: promise.kind === 'max_drop' ? { y: 100 * sweep.points[0].metric.before - promise.asked, text: `asked: at most ${promise.asked} points less` } : null,
        original: { y: 100 * sweep.points[0].metric.before },
      }) : null,
    ].filter(Boolean));
  };
  const buttons = new Map(units.map((unit) => [unit, html('button', { type: 'button', 'aria-pressed': 'false', onclick: () => show(unit) }, GAINS[unit].name)]));
  show(units.includes(sweep.gains) ? sweep.gains : units[0]);
  return html('div', {}, html('div', { class: 'tools' }, html('div', { class: 'switch', role: 'group', 'aria-label': 'What is gained' }, [...buttons.values()])), place);
}

function sweepPage(sweep) {
  const footer = html('footer', {}, 'Every number here is in the sweep\u2019s JSON, which this file holds.');
  if (!sweep.points.length) return [sweepHead(sweep), footer];
  return [
    sweepHead(sweep),
    section('What more would cost', `Every model was run side by side with the original: errors and scores on ${plural(sweep.points[0].samples, 'sample')} that were not fitted to, times in one thread of this machine. Upright lines are 95\u202f% intervals.`, sweepCurves(sweep)),
    section('The models', null, sweepTable(sweep)),
    footer,
  ];
}
