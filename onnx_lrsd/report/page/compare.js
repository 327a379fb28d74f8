'use strict';
// The page of two models side by side, and of where they drift apart tensor by tensor.

function comparisonHead(report) {
  const samples = plural(report.data.samples, 'sample');
  return html('header', {},
    html('div', { class: 'top' }, html('span', {}, `onnx-lrsd ${report.tool.version}`), themeButton()),
    html('h1', {}, base(report.model.before), html('span', { class: 'arrow' }, ' and '), base(report.model.after)),
    html('p', { class: 'soft' }, `Run on ${samples}${report.data.source ? ` of ${base(report.data.source)}` : ''}`),
    notes(report));
}

const ORDERS = {
  graph: { name: 'in the order of the graph', value: (tensor) => tensor.index },
  growth: { name: 'largest growth first', value: (tensor) => -tensor.growth },
  error: { name: 'largest error first', value: (tensor) => -(tensor.error ?? Infinity) },
};

function driftSection(report) {
  if (!report.tensors?.length) return null;
  const tensors = report.tensors.map((tensor, index) => ({ ...tensor, index, growth: (tensor.error ?? Infinity) - (tensor.inherited ?? 0) }));
  const drawn = tensors.filter((tensor) => tensor.error > 0);
  const find = (name) => tensors.find((tensor) => tensor.name === name);
  const [first, most] = [find(report.drift?.first), find(report.drift?.most)];
  const place = (tensor, text) => (tensor?.error > 0 ? { kind: 'ring', x: tensor.index + 1, y: tensor.error, text } : null);
  const chart = drawn.length ? plot((width) => ({
    height: Math.min(340, Math.max(240, width * 0.36)),
    label: 'Error of every tensor that both models compute, in the order of the graph',
    x: { domain: [0.5, tensors.length + 0.5], format: format.tick, title: 'tensor, in the order of the graph' },
    y: { domain: domain(drawn.map((tensor) => Math.max(tensor.error, 1e-14)), true), log: true, format: format.percentTick, title: 'error, share of the tensor\u2019s variance' },
    marks: [
      { kind: 'line', points: drawn.map((tensor) => [tensor.index + 1, Math.max(tensor.error, 1e-14)]) },
      { kind: 'dots', radius: 2.6, points: drawn.map((tensor) => ({ x: tensor.index + 1, y: Math.max(tensor.error, 1e-14), text: `${tensor.op} ${shorten(tensor.name, 50)}\n${format.error(tensor.error)}, ${format.error(tensor.inherited)} before it` })) },
      first === most ? place(first, 'first and most') : place(first, 'first'),
      first === most ? null : place(most, 'most'),
    ].filter(Boolean),
  })) : null;
  const says = [];
  if (first) says.push(`They first differ after ${first.node} (${first.op}), by ${format.error(first.error)}.`);
  if (most) says.push(`The error grows most at ${most.node} (${most.op}): from ${format.error(most.inherited)} to ${format.error(most.error)}.`);
  if (!says.length) says.push('No tensor differs by more than rounding.');

  const state = { text: '', order: 'graph' };
  const body = html('tbody', {});
  const count = html('span', { class: 'count', role: 'status' });
  const show = () => {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = tensors.filter((tensor) => words.every((word) => `${tensor.name} ${tensor.node} ${tensor.op}`.toLowerCase().includes(word)))
      .sort((a, b) => ORDERS[state.order].value(a) - ORDERS[state.order].value(b) || a.index - b.index);
    body.replaceChildren(...shown.map((tensor) => html('tr', { 'data-name': tensor.name },
      html('td', { class: 'mono', title: tensor.name }, shorten(tensor.name, 56)),
      html('td', {}, tensor.op),
      html('td', { class: 'number' }, format.error(tensor.error)),
      html('td', { class: 'number soft' }, format.error(tensor.inherited)),
      html('td', { class: 'number' }, tensor.cosine === null ? '\u2013' : tensor.cosine.toFixed(6)),
      html('td', { class: 'number' }, format.tick(tensor.largest)))));
    count.textContent = shown.length === tensors.length ? plural(tensors.length, 'tensor') : `${shown.length} of ${plural(tensors.length, 'tensor')}`;
  };
  const search = html('input', { type: 'search', placeholder: 'Filter by name or op', 'aria-label': 'Filter tensors' });
  search.addEventListener('input', () => { state.text = search.value; show(); });
  const order = html('select', { 'aria-label': 'Order of the tensors' }, Object.entries(ORDERS).map(([key, { name }]) => html('option', { value: key }, name)));
  order.addEventListener('change', () => { state.order = order.value; show(); });
  show();
  const heads = [['Tensor', ''], ['Op', ''], ['Error', 'number'], ['Before it', 'number'], ['Cosine', 'number'], ['Largest difference', 'number']];
  const table = html('table', { class: 'plain' }, html('thead', {}, html('tr', {}, heads.map(([title, classes]) => html('th', { scope: 'col', class: classes }, title)))), body);
  return section('Where they drift apart', says.join(' '), chart,
    html('div', { class: 'tools', style: { marginTop: '18px' } }, search, order, count),
    html('div', { class: 'list tensors', tabindex: '0', role: 'region', 'aria-label': 'Tensors' }, table));
}

function comparisonPage(report) {
  return [
    comparisonHead(report), figures(report), outputsSection(report), driftSection(report),
    html('footer', {}, 'Every number here is in the comparison\u2019s JSON, which this file holds.'),
  ];
}
