// The two interactive parts of report.html. report.py inserts this script and `data` into the page.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const pictures = data.pictures.map(bytes); // [side, side, 3] each
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const short = (x) => String(Number(x.toPrecision(3)));

/** Paints a canvas: color(row, column) returns [r, g, b], or null for a transparent pixel. */
function paint(canvas, width, height, color) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const rgb = color(Math.floor(i / width), i % width);
    if (rgb) image.data.set([...rgb, 255], 4 * i);
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}

/** Maps -1 to blue, 0 to white and 1 to vermilion. The square root makes weak responses visible. */
function diverging(t) {
  const end = t < 0 ? [0, 114, 178] : [213, 94, 0];
  return end.map((x) => 255 + Math.sqrt(Math.min(1, Math.abs(t))) * (x - 255));
}

function paintPicture(canvas, i) {
  const { side } = data;
  paint(canvas, side, side, (r, c) => pictures[i].subarray(3 * (r * side + c), 3 * (r * side + c) + 3));
}

/** Adds radio buttons with thumbnails: the tab key reaches the group, arrow keys move within it. */
function choices(fieldset, name, labels, draw, choose) {
  labels.forEach((text, i) => {
    const label = document.createElement('label'), input = document.createElement('input');
    const canvas = document.createElement('canvas');
    label.className = 'choice';
    label.title = text;
    Object.assign(input, { type: 'radio', name, checked: i === 0 });
    input.setAttribute('aria-label', text);
    input.addEventListener('change', () => choose(i));
    draw(canvas, i);
    label.append(input, canvas);
    fieldset.append(label);
  });
}

/** Handles keys in a section, except in inputs and with modifier keys, where the browser uses them. */
function keys(section, moves) {
  section.addEventListener('keydown', (event) => {
    const { altKey, ctrlKey, metaKey, shiftKey } = event;
    if (altKey || ctrlKey || metaKey || shiftKey || event.target instanceof HTMLInputElement || !(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
  });
}

function slideFilter(section, { size, stride, padding: [before, after], std, ...texts }) {
  const find = (name) => section.querySelector('.' + name);
  const { side } = data, padded = side + before + after;
  const positions = Math.floor((padded - size) / stride) + 1, last = positions * positions - 1;
  const background = floats(texts.background), kernels = floats(texts.kernels), biases = floats(texts.biases);
  const length = 3 * size * size;
  const low = kernels.reduce((a, b) => Math.min(a, b)), high = kernels.reduce((a, b) => Math.max(a, b));
  const reduced = matchMedia('(prefers-reduced-motion: reduce)').matches;
  let picture = 0, kernel = 0, place = 0, map, scale, timer = null, since = 0;

  /** Returns the network's input at a position: mean-subtracted, zero in the padding. */
  function input(picture, row, column, channel) {
    if (row < 0 || column < 0 || row >= side || column >= side) return 0;
    const i = 3 * (row * side + column) + channel;
    return pictures[picture][i] / std[channel] + background[i];
  }

  /** Returns the products at (row, column) of the map, summed over the three colors of each pixel. */
  function products(picture, kernel, row, column) {
    const found = new Float64Array(size * size);
    for (let i = 0; i < length; i++) {
      const pixel = Math.floor(i / 3), y = row * stride - before + Math.floor(pixel / size);
      const x = column * stride - before + (pixel % size);
      found[pixel] += kernels[kernel * length + i] * input(picture, y, x, i % 3);
    }
    return found;
  }

  function featureMap(picture, kernel) {
    const at = (_, i) => products(picture, kernel, Math.floor(i / positions), i % positions).reduce((a, b) => a + b, biases[kernel]);
    return Float32Array.from({ length: last + 1 }, at);
  }

  function paintKernel(canvas, k) {
    const color = (r, c) => [0, 1, 2].map((i) => (255 * (kernels[k * length + 3 * (r * size + c) + i] - low)) / (high - low || 1));
    paint(canvas, size, size, color);
  }

  function draw() {
    const row = Math.floor(place / positions), column = place % positions;
    const top = row * stride, left = column * stride; // in the padded image
    const canvas = find('picture'), zoom = Math.max(1, Math.floor(480 / padded)), plain = document.createElement('canvas');
    paint(plain, padded, padded, (r, c) => {
      const y = r - before, x = c - before;
      if (y < 0 || x < 0 || y >= side || x >= side) return [128, 128, 128];
      return pictures[picture].subarray(3 * (y * side + x), 3 * (y * side + x) + 3);
    });
    canvas.width = canvas.height = zoom * padded + 10;
    const context = canvas.getContext('2d');
    context.imageSmoothingEnabled = false;
    context.translate(5, 5); // space for the frame of windows at the border
    context.drawImage(plain, 0, 0, zoom * padded, zoom * padded);
    for (const [width, color] of [[6, '#000'], [3, '#f0e442']]) {
      context.lineWidth = width;
      context.strokeStyle = color;
      context.strokeRect(zoom * left - 2, zoom * top - 2, zoom * size + 4, zoom * size + 4);
    }
    paint(find('patch'), size, size, (r, c) =>
      [0, 1, 2].map((i) => 128 + std[i] * input(picture, top - before + r, left - before + c, i)));
    const shares = products(picture, kernel, row, column);
    const most = Math.max(...shares.map(Math.abs)) || 1;
    paint(find('products'), size, size, (r, c) => diverging(shares[r * size + c] / most));
    paint(find('map'), positions, positions, (r, c) => (r * positions + c <= place ? diverging(map[r * positions + c] / scale) : null));
    canvas.setAttribute('aria-label', `${data.captions[picture]}, window at row ${row + 1}, column ${column + 1}`);
    find('place').value = place;
    const where = `Row ${row + 1} of ${positions}, column ${column + 1}`;
    find('place').setAttribute('aria-valuetext', where);
    find('value').textContent = `${where}: ${length} products and the bias ${short(biases[kernel])} add up to ${short(map[place])}.`;
  }

  function choose(newPicture, newKernel) {
    [picture, kernel] = [newPicture, newKernel];
    map = featureMap(picture, kernel);
    scale = map.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
    paintKernel(find('kernel'), kernel);
    find('kernel').setAttribute('aria-label', `Kernel ${kernel + 1}`);
    find('map').setAttribute('aria-label', `Feature map of kernel ${kernel + 1}, ${positions} by ${positions}`);
    find('low').textContent = short(-scale);
    find('high').textContent = short(scale);
    draw();
  }

  function move(to) {
    place = clamp(to, 0, last);
    draw();
  }

  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(tick, 20) : null;
    find('play').textContent = on ? 'Pause' : 'Play';
    find('value').setAttribute('aria-live', on ? 'off' : 'polite');
    since = performance.now();
    if (on && place === last) move(0);
  }

  function tick() {
    const speed = 2 ** find('speed').value, due = Math.floor(((performance.now() - since) * speed) / 1000);
    if (due === 0) return;
    since += (1000 * due) / speed;
    move(place + due);
    if (place === last) play(false);
  }

  const names = Array.from(biases, (_, k) => `Kernel ${k + 1} of ${biases.length}`);
  choices(find('pictures'), 'slide-picture', data.captions, paintPicture, (i) => choose(i, kernel));
  choices(find('kernels'), 'slide-kernel', names, paintKernel, (k) => choose(picture, k));
  find('place').max = last;
  find('place').addEventListener('input', (event) => move(Number(event.target.value)));
  find('speed').value = reduced ? 1 : 5;
  find('play').addEventListener('click', () => play(timer === null));
  find('step').addEventListener('click', () => move(place + 1));
  const row = (by) => () => move(place + by * positions);
  keys(section, { ArrowRight: () => move(place + 1), ArrowLeft: () => move(place - 1), ArrowDown: row(1), ArrowUp: row(-1) });
  choose(0, 0);
  return { featureMap };
}

function walkLayers(section, { stages, labels }) {
  const find = (name) => section.querySelector('.' + name);
  const count = stages.length + 2; // the image first, the labels last
  const layers = [...new Set(stages.map((stage) => stage.layer))];
  const stops = [['image', 0], ...layers.map((name) => [name, 1 + stages.findIndex((stage) => stage.layer === name)]), ['labels', count - 1]];
  let picture = 0, at = 0;

  const canvasIn = (maps) => maps.appendChild(document.createElement('canvas'));

  function drawStage(maps, stage) {
    const { scale, bytes: text } = stage.pictures[picture], { width, height, chosen = [1] } = stage, values = bytes(text);
    chosen.forEach((_, i) => paint(canvasIn(maps), width, height, (r, c) => {
      const value = values[(i * height + r) * width + c]; // undefined after the last unit
      return value === undefined ? null : diverging((value - 128) / 127);
    }));
    find('low').textContent = short(-scale);
    find('high').textContent = short(scale);
  }

  function draw() {
    const stage = stages[at - 1], maps = find('maps'), caption = data.captions[picture];
    maps.replaceChildren();
    find('bars').replaceChildren();
    find('legend').hidden = !stage;
    let title, description, note = '';
    if (stage) {
      const shown = stage.chosen ? `maps ${stage.chosen.join(', ')}` : stage.units < Number(stage.shape) ? `the first ${stage.units} units` : 'all units, row by row';
      title = `${stage.layer}: ${stage.operation}`;
      description = stage.description;
      note = `Output: ${stage.shape}. Parameters: ${stage.parameters ? stage.parameters.toLocaleString('en') : 'none'}. Shown: ${shown}.`;
      drawStage(maps, stage);
    } else if (at === 0) {
      [title, description] = ['the image', `${caption}. The input of the network is this image minus the mean of the training images.`];
      note = `${data.side} x ${data.side} x 3 numbers.`;
      paintPicture(canvasIn(maps), picture);
    } else {
      [title, description] = ['the labels', `The most probable labels of ${caption}, from the center crop only.`];
      for (const { label, probability } of labels[picture]) {
        const [dt, dd, bar] = ['dt', 'dd', 'dd'].map((name) => document.createElement(name));
        dt.textContent = label;
        dd.textContent = `${(100 * probability).toFixed(1)}%`;
        bar.className = 'bar';
        bar.style.width = `${100 * probability}%`;
        find('bars').append(dt, dd, bar);
      }
    }
    maps.className = 'maps' + (!stage ? ' picture' : stage.chosen ? '' : ' whole');
    maps.setAttribute('aria-label', `${caption} at ${title}`);
    find('value').textContent = `${at + 1} of ${count}, ${title}`;
    find('description').textContent = description;
    find('note').textContent = note;
    find('previous').setAttribute('aria-disabled', at === 0); // `disabled` would lose the keyboard focus
    find('next').setAttribute('aria-disabled', at === count - 1);
    const here = stops.findLastIndex(([, first]) => first <= at);
    Array.from(find('layers').children, (button, i) => button.setAttribute('aria-current', i === here));
  }

  function go(to) {
    at = clamp(to, 0, count - 1);
    draw();
  }

  for (const [name, first] of stops) {
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', textContent: name });
    button.addEventListener('click', () => go(first));
    find('layers').append(button);
  }
  choices(find('pictures'), 'walk-picture', data.captions, paintPicture, (i) => { picture = i; draw(); });
  find('previous').addEventListener('click', () => go(at - 1));
  find('next').addEventListener('click', () => go(at + 1));
  keys(section, { ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1) });
  draw();
}

window.report = {};
if (data.slide) window.report = slideFilter(document.getElementById('slide'), data.slide);
if (data.walk) walkLayers(document.getElementById('walk'), data.walk);
