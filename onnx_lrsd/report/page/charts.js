'use strict';
// Small charts in SVG: axes with units, lines, dots, steps and rules. Everything that comes from a model is
// set as text, never as markup.

const SVG = 'http://www.w3.org/2000/svg';

/** An HTML element with properties, and children that are elements, texts, or nothing. */
function html(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'class') element.className = value;
    else if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// ---- numbers, as in the terminal: ratios are rounded down and errors up

const THIN = '\u202f'; // a number and its unit stay together

function scaled(value, steps) {
  for (const [unit, size] of steps) {
    if (Math.abs(value) >= size) return (value / size).toFixed(2) + THIN + unit;
  }
  return null;
}

const format = {
  bytes: (n) => scaled(n, [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]]) ?? n + THIN + 'B',
  count: (n) => scaled(n, [['G', 1e9], ['M', 1e6], ['k', 1e3]]) ?? String(n),
  integer: (n) => n.toLocaleString('en'),
  seconds: (s) => scaled(s, [['s', 1], ['ms', 1e-3]]) ?? (s * 1e6).toFixed(1) + THIN + '\u00b5s',
  milliseconds: (ms) => format.seconds(ms / 1e3),
  down: (ratio) => (Math.floor(ratio * 100 + 1e-9) / 100).toFixed(2),
  times: (ratio) => (Number.isFinite(ratio) ? format.down(ratio) + THIN + '\u00d7' : '\u2013'),
  share: (part) => (100 * part).toFixed(1) + THIN + '%',
  error(error) {
    if (error === null || error === undefined || !Number.isFinite(error)) return 'not finite';
    if (error <= 0) return '0' + THIN + '%';
    const percent = 100 * error;
    if (percent > 1e6) return percent.toExponential(1) + THIN + '%';
    const digits = Math.max(1 - Math.floor(Math.log10(percent)), 0);
    if (digits > 6) return '<' + THIN + '0.00001' + THIN + '%';
    const power = 10 ** digits;
    return (Math.ceil(percent * power - 1e-9) / power).toFixed(digits) + THIN + '%';
  },
  tick(value) {
    if (value === 0) return '0';
    value = Number(value.toPrecision(6));
    const size = Math.abs(value);
    if (size < 1e-4 || size >= 1e6) return value.toExponential(0).replace('e-', 'e\u2212').replace('e+', 'e');
    return String(Number(value.toPrecision(3))).replace('-', '\u2212');
  },
  percentTick: (value) => format.tick(100 * value) + THIN + '%',
  signed: (value, digits) => (value < 0 ? '\u2212' : '+') + Math.abs(value).toFixed(digits),
};

/** A name cut in its middle: exporters tell layers apart at both ends. */
function shorten(name, width) {
  if (name.length <= width) return name;
  const head = Math.floor((width - 1) / 2);
  return name.slice(0, head) + '\u2026' + name.slice(name.length - (width - 1 - head));
}

function plural(count, noun) {
  return format.integer(count) + ' ' + noun + (count === 1 ? '' : 's');
}

// ---- scales

function logTicks(low, high, most) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.ceil(Math.log10(high) - 1e-9);
  const steps = last - first <= 1 ? [1, 2, 3, 5] : last - first <= 2 ? [1, 2, 5] : last - first <= 3 ? [1, 3] : [1];
  const ticks = [];
  const stride = Math.max(1, Math.ceil((last - first) / most));
  for (let power = first; power <= last; power += steps.length > 1 ? 1 : stride) {
    for (const step of steps) ticks.push(step * 10 ** power);
  }
  return ticks.filter((tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9));
}

function linearTicks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((value) => value >= rough * (1 - 1e-9));
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) {
    ticks.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
  }
  return ticks;
}

/** The least and greatest of ``values`` widened by a share, in the logarithm where ``log``. */
function domain(values, log, share = 0.04) {
  const finite = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  let low = Math.min(...finite), high = Math.max(...finite);
  if (!finite.length) return log ? [0.1, 1] : [0, 1];
  if (log) {
    if (high / low < 4) [low, high] = [low / 2, high * 2];
    const room = (high / low) ** share;
    return [low / room, high * room];
  }
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  return [low - (high - low) * share, high + (high - low) * share];
}

function scale([low, high], [start, end], log) {
  const of = log ? Math.log : (value) => value;
  const factor = (end - start) / (of(high) - of(low));
  return (value) => start + (of(value) - of(low)) * factor;
}

// ---- marks

const SHAPES = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  square: (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  up: (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.85}H${-r * 1.15}z`,
  down: (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.85}H${-r * 1.15}z`,
  diamond: (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0z`,
  cross: (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
};

function glyph(shape, classes, x = 0, y = 0, radius = 3.2) {
  return svg('path', { d: SHAPES[shape](radius), class: 'mark ' + classes, transform: `translate(${x},${y})` });
}

function path(points) {
  return points.map(([x, y], index) => (index ? 'L' : 'M') + x.toFixed(1) + ',' + y.toFixed(1)).join('');
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (Math.round(target.clientWidth) !== target.drawnWidth && target.clientWidth) target.draw();
  }
});

/**
 * A chart that draws itself anew as wide as its place. ``describe`` gives its parts for a width:
 * {height, label, x, y, marks}; an axis is {domain, log, format, title, ticks, grid}.
 */
function plot(describe) {
  const host = html('div', { class: 'plot' });
  host.draw = () => {
    const width = Math.max(host.clientWidth || 480, 160);
    host.drawnWidth = Math.round(host.clientWidth);
    host.replaceChildren(picture(describe(width), width, host));
  };
  resized.observe(host);
  host.draw();
  return host;
}

function picture(spec, width, host) {
  const { x, y, marks, height } = spec;
  const yTicks = y.ticks ?? (y.log ? logTicks(...y.domain, 6) : linearTicks(...y.domain, 4));
  const widest = Math.max(...yTicks.map((tick) => y.format(tick).length), 1);
  const margin = { top: y.title ? 26 : 8, right: spec.right ?? 14, bottom: 40, left: Math.max(widest * 6.6 + 10, 28) };
  const [left, right] = [margin.left, width - margin.right];
  const [top, bottom] = [margin.top, height - margin.bottom];
  const toX = scale(x.domain, [left, right], x.log), toY = scale(y.domain, [bottom, top], y.log);
  const most = Math.max(2, Math.floor((right - left) / 62));
  let xTicks = x.ticks ?? (x.log ? logTicks(...x.domain, most) : linearTicks(...x.domain, most));
  let last = -Infinity;
  xTicks = xTicks.filter((tick) => {
    const clear = toX(tick) - last >= 8 + 7 * x.format(tick).length;
    if (clear) last = toX(tick);
    return clear;
  });
  const root = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': spec.label });
  for (const tick of yTicks) {
    const at = toY(tick);
    root.append(svg('line', { class: 'gridline', x1: left, x2: right, y1: at, y2: at }));
    root.append(svg('text', { x: left - 7, y: at + 4, 'text-anchor': 'end' }, y.format(tick)));
  }
  root.append(svg('line', { class: 'axis', x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const tick of xTicks) {
    const at = toX(tick);
    root.append(svg('line', { class: 'axis', x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    root.append(svg('text', { x: at, y: bottom + 17, 'text-anchor': 'middle' }, x.format(tick)));
  }
  if (y.title) root.append(svg('text', { class: 'title', x: 0, y: 11 }, y.title));
  root.append(svg('text', { class: 'title', x: right, y: height - 4, 'text-anchor': 'end' }, x.title));
  const spots = [];
  for (const mark of marks) draw(mark, root, { toX, toY, left, right, top, bottom, spots, width });
  if (spots.length) point(root, host, spots, width);
  return root;
}

function draw(mark, root, { toX, toY, left, right, top, bottom, spots, width }) {
  const classes = mark.class ?? '';
  const inside = (value) => Math.min(Math.max(value, top), bottom);
  if (mark.kind === 'line') {
    root.append(svg('path', { class: 'line ' + classes, d: path(mark.points.map(([a, b]) => [toX(a), inside(toY(b))])) }));
  } else if (mark.kind === 'steps') {
    const { low, high, values, filled } = mark;
    const wide = (high - low) / values.length;
    const points = [[toX(low), bottom]];
    values.forEach((value, index) => {
      points.push([toX(low + index * wide), toY(value)], [toX(low + (index + 1) * wide), toY(value)]);
    });
    points.push([toX(high), bottom]);
    root.append(svg('path', { class: (filled ? 'area ' : 'line ') + classes, d: path(points) }));
  } else if (mark.kind === 'rule') {
    const vertical = mark.x !== undefined;
    const at = vertical ? toX(mark.x) : toY(mark.y);
    const ends = vertical ? { x1: at, x2: at, y1: top, y2: bottom } : { x1: left, x2: right, y1: at, y2: at };
    root.append(svg('line', { class: 'rule', ...ends }));
    if (!mark.text) return;
    const late = vertical && at > (left + right) / 2;
    const place = vertical ? { x: at + (late ? -6 : 6), y: top + 10, 'text-anchor': late ? 'end' : 'start' }
      : { x: right, y: at - 5, 'text-anchor': 'end' };
    root.append(svg('text', { class: 'halo', ...place }, mark.text));
  } else if (mark.kind === 'dots') {
    for (const dot of mark.points) {
      const [a, b] = [toX(dot.x), inside(toY(dot.y))];
      root.append(glyph(mark.shape ?? 'circle', classes, a, b, mark.radius));
      if (dot.text) spots.push({ x: a, y: b, text: dot.text });
    }
  } else if (mark.kind === 'ring') {
    const [a, b] = [toX(mark.x), inside(toY(mark.y))];
    root.append(svg('circle', { class: 'ring', cx: a, cy: b, r: 8 }));
    if (!mark.text) return;
    // A falling curve leaves room above to the right, a rising one above to the left.
    const fits = a + 13 + 7.5 * mark.text.length < right;
    const late = mark.falling ? !fits : a > left + (right - left) * 0.6;
    const x = mark.falling && late ? right : a + (late ? -13 : 13);
    const y = Math.max(b - (mark.falling && late ? 15 : 7), top + 8);
    root.append(svg('text', { class: 'strong halo', x, y, 'text-anchor': late ? 'end' : 'start' }, mark.text));
  }
}

/** What lies nearest to the pointer says what it is. */
function point(root, host, spots, width) {
  const tip = html('div', { class: 'tip', hidden: true });
  const ring = svg('circle', { class: 'focus', r: 6, visibility: 'hidden' });
  root.append(ring);
  const leave = () => {
    tip.hidden = true;
    ring.setAttribute('visibility', 'hidden');
  };
  const look = (event) => {
    const box = root.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * width / box.width];
    const near = spots.reduce((best, spot) => {
      const distance = Math.hypot(spot.x - x, spot.y - y);
      return distance < best.distance ? { spot, distance } : best;
    }, { distance: 22 }).spot;
    if (!near) return leave();
    ring.setAttribute('cx', near.x);
    ring.setAttribute('cy', near.y);
    ring.setAttribute('visibility', 'visible');
    tip.textContent = near.text;
    tip.hidden = false;
    if (!tip.isConnected) host.append(tip);
    const half = tip.offsetWidth / 2;
    tip.style.left = Math.min(Math.max(near.x * box.width / width, half), box.width - half) + 'px';
    tip.style.top = (near.y * box.width / width) - 10 + 'px';
  };
  root.addEventListener('pointermove', look);
  root.addEventListener('pointerdown', look);
  root.addEventListener('pointerleave', leave);
}

/** Rows of digits as cells, the larger the darker. */
function cells(rows, label, tall) {
  const columns = Math.max(...rows.map((row) => row.length));
  const byLevel = new Map();
  rows.forEach((row, y) => [...row].forEach((digit, x) => {
    byLevel.set(digit, (byLevel.get(digit) ?? '') + `M${x},${y}h1v1h-1z`);
  }));
  const root = svg('svg', { viewBox: `0 0 ${columns} ${rows.length}`, role: 'img', 'aria-label': label, preserveAspectRatio: 'none' });
  root.style.height = tall + 'px';
  for (const [digit, d] of byLevel) {
    root.append(digit === '0' ? svg('path', { class: 'void', d }) : svg('path', { class: 'cell', d, opacity: 0.25 + 0.75 * digit / 9 }));
  }
  return html('div', { class: 'plot' }, root);
}
